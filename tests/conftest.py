"""For all tests: a folder's name is its tests' mark, and hypothesis draws the same examples in every run."""

from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent

# Examples are few, since a ring of eight ranks is hundreds of small kernels; the exactness tests ask for more.
hypothesis.settings.register_profile(
    "distflash",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("distflash")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(item.path.relative_to(ROOT).parts[0])
