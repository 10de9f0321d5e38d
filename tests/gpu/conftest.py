"""Tests that need a GPU: skipped, with the reason, if there is none."""

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks


def pytest_runtest_setup() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """NCCL ranks, which share GPUs where there are too few; see `benchmarks.common.take_gpu`."""
    count = request.config.getoption("--ranks") or max(2, torch.cuda.device_count())
    started = Ranks(count, "nccl", timeout=120)
    yield started
    started.stop()
