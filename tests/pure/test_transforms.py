"""Derivatives other than a backward pass: right, or an error; eager and compiled."""

import pytest
import torch
from torch.autograd import forward_ad

import distflash as df

CLOSE = dict(rtol=1e-12, atol=1e-12)


def qkv(*batch):
    torch.manual_seed(0)
    return [torch.randn(*batch, 1, 5, 2, 8, dtype=torch.float64) for _ in range(3)]


def test_vmap_is_a_loop_and_so_are_its_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(3))
    got = torch.func.vmap(lambda q, k: df.attention(q, k, v[0], mask=df.Causal()))(q, k)
    expected = torch.stack([df.attention(a, b, v[0], mask=df.Causal()) for a, b in zip(q, k, strict=True)])
    torch.testing.assert_close(got, expected, **CLOSE)
    dout = torch.randn_like(got)
    for mine, loop in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (got, expected)), strict=True):
        torch.testing.assert_close(mine, loop, **CLOSE)


def test_forward_mode_elsewhere_is_none_of_attentions_business():
    """A tangent of another tensor does not make attention refuse; nor does a level without tangents."""
    q, k, v = qkv()
    with forward_ad.dual_level():
        other = forward_ad.make_dual(q, torch.ones_like(q))
        out = df.attention(q, k, v)
        assert forward_ad.unpack_dual(out + other).tangent.equal(torch.ones_like(q))
    assert torch.equal(out, df.attention(q, k, v))


def test_a_second_derivative_raises():
    q, k, v = (x.requires_grad_() for x in qkv())
    (dq,) = torch.autograd.grad(df.attention(q, k, v).square().sum(), q, create_graph=True)
    assert dq.requires_grad
    for target in (q, k, v):
        with pytest.raises(RuntimeError, match="differentiate twice"):
            torch.autograd.grad(dq.square().sum(), target, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_forward_mode_while_compiling_is_refused(fullgraph):
    torch._dynamo.reset()
    q, k, v = qkv()

    @torch.compile(backend="aot_eager", fullgraph=fullgraph)
    def tangent(q):
        return torch.func.jvp(lambda q: df.attention(q, k, v), (q,), (torch.ones_like(q),))[1]

    with pytest.raises(Exception, match="forward-mode AD"):
        tangent(q)


def test_forward_mode_around_what_is_compiled_is_refused():
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda q: df.attention(q, k, v), backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(q), df.attention(q, k, v))
        with forward_ad.dual_level(), pytest.raises(Exception, match="forward-mode AD"):
            compiled(forward_ad.make_dual(q, torch.ones_like(q)))
