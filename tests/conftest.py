"""Settings for all tests: folders become marks, and without --full hypothesis draws the same examples in every run."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from tests import pairs

ROOT = Path(__file__).parent

# Triton reads this when it is first imported, and torch imports triton here and there: so for all folders, and early.
# Where there is a GPU its tests must not see it: `tests/kernels` then runs in a process without them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are few, since a ring of eight ranks is hundreds of small kernels; the exactness tests ask for more.
hypothesis.settings.register_profile(
    "distflash",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# What `--full` asks for: other examples in every run, and ten times as many, also of a test that says how many it wants
# by `tests.strategies.examples`.
hypothesis.settings.register_profile(
    "distflash-full", hypothesis.settings.get_profile("distflash"), derandomize=False, max_examples=400
)
# What `--few` asks for: the first tenth of them.
hypothesis.settings.register_profile("distflash-few", hypothesis.settings.get_profile("distflash"), max_examples=4)
hypothesis.settings.load_profile("distflash")


pytest_generate_tests = pairs.parametrize


def pytest_configure(config: pytest.Config) -> None:
    for name in ("full", "few"):
        if config.getoption(f"--{name}"):
            hypothesis.settings.load_profile(f"distflash-{name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", action="store_true", help="a tenth of the random examples, for the inner loop")
    parser.addoption(
        "--full",
        action="store_true",
        help="all combinations where CI takes a covering part of them, and ten times as many fresh random examples",
    )
    parser.addoption(
        "--ranks", type=int, help="NCCL ranks of tests/gpu, more than GPUs if need be; by default one a GPU, at least 2"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(item.path.relative_to(ROOT).parts[0])
