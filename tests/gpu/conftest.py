"""Tests that need a GPU: skipped, with the reason, where there is none, or too few."""

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks


def pytest_runtest_setup() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """As many NCCL ranks as there are GPUs."""
    found = torch.cuda.device_count()
    if found < 2:
        pytest.skip(f"needs at least 2 GPUs, found {found}")
    started = Ranks(found, "nccl", timeout=120)
    yield started
    started.stop()
