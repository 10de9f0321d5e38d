"""The Triton kernels' launches with empty tensors and unusual strides."""

from itertools import product

import pytest
import torch

import distflash as df
from distflash.kernels.launch import Launch, aligned
from distflash.kernels.triton.launches import _strided
from tests.dense import Problem, assert_no_less_exact, in_dtype, make_inputs, on_ranks
from tests.strided import STRIDES

KERNEL = df.kernels.Triton(interpret=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("seq_len", "layout", "ranks"),
    [(1, df.Striped(), 3), (0, df.Striped(), 2), (2, df.Zigzag(), 3), (1, df.Contiguous(), 2)],
    ids=repr,
)
def test_ranks_without_tokens(seq_len, layout, ranks, dtype):
    """Each batch of an empty output has a stride, but no row to step over."""
    p = in_dtype(Problem(seq_len=seq_len, batch=2, heads=4, kv_heads=2, d_qk=24, d_v=24, sinks=True), dtype)
    x = make_inputs(p)
    one_rank = on_ranks(p, x, 1, layout, KERNEL)
    assert_no_less_exact(p, x, on_ranks(p, x, ranks, layout, KERNEL), one_rank)


def test_a_batch_of_none():
    p = Problem(seq_len=5, batch=0, heads=4, kv_heads=2, d_qk=24, d_v=24, sinks=True, dtype=torch.float32)
    got = on_ranks(p, make_inputs(p), 2, df.Striped(), KERNEL)
    assert got["out"].shape == got["dq"].shape == (0, 5, 4, 24)
    assert (got["dsinks"] == 0).all()


@pytest.mark.parametrize("strides", STRIDES)
def test_no_tensor_is_refused(strides):
    """Whatever its strides: copied if need be, and then read at the strides that the kernels are told."""
    for shape in product((0, 1, 3), (0, 1, 2), (1, 2), (16, 24)):
        x = STRIDES[strides](torch.arange(torch.Size(shape).numel()).float().view(shape)).resolve_neg()
        given, head, row = _strided(aligned(x, packed=True))
        assert torch.equal(given.as_strided(shape, (shape[1] * row, row, head, 1)), x), shape


def test_nothing_is_launched_for_no_rows():
    Launch(kernel=None, programs=0, arguments={}).run()


def by_sinks_and_slopes(strides):
    """Out and the sinks' gradient with both tensors at these strides."""
    x = make_inputs(
        Problem(seq_len=9, heads=4, kv_heads=2, d_qk=16, d_v=16, sinks=True, alibi=True, dtype=torch.float32)
    )
    cp = df.ContextParallel(df.transport.Alone(), kernel=KERNEL)
    sinks = strides(x.sinks).detach().requires_grad_()
    out = df.attention(x.q, x.k, x.v, mask=df.Causal(), cp=cp, sinks=sinks, alibi_slopes=strides(x.slopes))
    out.backward(x.dout)
    return out.detach(), sinks.grad


def test_sinks_and_slopes_at_any_strides():
    """Kernels read ``[H]`` one after the other: at other strides they took other heads' numbers."""
    strided, plain = by_sinks_and_slopes(STRIDES["every second"]), by_sinks_and_slopes(STRIDES["plain"])
    assert all(torch.equal(got, expected) for got, expected in zip(strided, plain, strict=True))
