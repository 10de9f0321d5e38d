"""The Hopper kernel on a GPU, against dense float64: the portable kernel's cases that it takes."""

from dataclasses import replace

import pytest
import torch

from distflash.kernels import Hopper
from tests import oracle

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not on_hopper, reason="no GPU of compute capability 9.0 here")]

DIMS = {32: 128, 40: 64}


def half(case: oracle.Case) -> oracle.Case:
    """The case in a dtype and at head dims that the kernel takes."""
    dtype = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    dims = {name: DIMS.get(getattr(case, name), getattr(case, name)) for name in ("d_qk", "d_v")}
    return replace(case, dtype=dtype, alibi=False, **dims)


CASES = [half(case) for case in oracle.cases()]


@pytest.fixture(autouse=True)
def exact_oracle():
    """The oracle's float32 products must be float32 products."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    oracle.check(Hopper(), oracle.scaled(case, 9), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_many_tiles(dim, dtype):
    case = oracle.Case("long", seq_len=4001, heads=4, kv_heads=2, d_qk=dim, d_v=dim, dtype=dtype)
    oracle.check(Hopper(), case, "cuda")
