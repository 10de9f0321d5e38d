"""The reference kernel, on the cases that every kernel is checked with."""

import pytest
import torch

from distflash.kernels import Reference
from distflash.kernels.base import Problem
from tests import oracle


@pytest.mark.parametrize("case", oracle.cases(), ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    oracle.check(Reference(block_q=48, block_k=40), case)


def problem(**options):
    return Problem(torch.device("cpu"), **dict(dtype=torch.float32, heads=2, kv_heads=1, d_qk=8, d_v=8) | options)


def test_it_takes_all_but_ints():
    kernel = Reference()
    assert kernel.not_supported_reasons(problem(softcap=1.0, alibi=True, sinks=True, dropout_p=0.1)) == []
    (reason,) = kernel.not_supported_reasons(problem(dtype=torch.int64))
    assert "int64" in reason


def test_the_whole_score_matrix_is_never_made():
    """Peak memory of one dense matrix here would be 64 MiB; tiles of 64 x 64 are 16 KiB."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    case = oracle.Case("long", seq_len=2048, heads=1, kv_heads=1, d_qk=16, d_v=16)
    x = oracle.make_inputs(case)
    with Watch():
        oracle.run(Reference(block_q=64, block_k=64), case, x)
    assert largest <= 2048 * 16 * 4  # of q, k and v themselves


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_blocks_have_a_size(size):
    with pytest.raises(ValueError, match=r"Reference\(block_q\)"):
        Reference(block_q=size)
    with pytest.raises(ValueError, match=r"Reference\(block_k\)"):
        Reference(block_k=size)
