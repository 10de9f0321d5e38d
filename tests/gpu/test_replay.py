"""Replayed launches with other tensors, on a GPU, against dense float64."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from distflash.kernels import Hopper, Kernel, Triton
from distflash.kernels.launch import Launch
from tests import oracle
from tests.gpu.test_hopper import CASES, exact_oracle, on_hopper

__all__ = ["exact_oracle"]  # a fixture
pytestmark = pytest.mark.gpu

KERNELS = [Triton(), *([Hopper()] if on_hopper else [])]
# A negative scale negates q, in a copy of its own for each launch.
REPLAYED = [case for case in CASES if case.scale is None or case.scale > 0]


def built_anew(self: Launch) -> NoReturn:
    raise AssertionError(f"{self.kernel} was built anew")


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("held_back", [0, 1])
def test_as_exact_as_dense(kernel: Kernel, case: oracle.Case, held_back: int, monkeypatch: pytest.MonkeyPatch):
    if held_back and (case.world_size == 1 or isinstance(kernel, Triton)):
        pytest.skip("there are no two sources, or the kernel takes one")
    case = oracle.scaled(case, 3)
    oracle.check(kernel, case, "cuda", held_back)
    taken = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in (512, 2**12, 2**16, 2**20, 2**21)]
    monkeypatch.setattr(Launch, "run", built_anew)
    oracle.check(kernel, case, "cuda", held_back)
    assert len(taken) == 5  # other addresses than the first time
