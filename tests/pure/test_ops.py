"""The custom ops: registration and compilation."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distflash as df
from distflash import ops
from distflash.given import Options
from distflash.transport import Alone
from tests.counting import Counting

CLOSE = dict(rtol=1e-12, atol=1e-12)
S, DIM = 12, 16
LENGTHS = [S, 0, -1]


def recipe_of(cp, **options):
    return cp.recipe(df.Causal(), Options(**options))[0]


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "sinks, slopes and dropout"])
def test_opcheck(extras):
    q, k, v = (torch.randn(2, S, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True) if extras else None
    slopes = torch.rand(4) if extras else None
    seed = torch.tensor(3) if extras else None
    cp = df.ContextParallel(Alone())
    recipe, _ = cp.recipe(df.Causal(), Options(dropout_p=0.3 if extras else 0.0))
    options = (sinks, slopes, seed, LENGTHS, True, recipe, [], None, None)
    arguments = (q, k, v, *options)
    torch.library.opcheck(torch.ops.distflash.attention.default, arguments)
    out, lse, number, _ = torch.ops.distflash.attention(*arguments)
    plain = [t if t is None else t.detach() for t in (torch.ones_like(out), None, q, k, v, out, lse, number)]
    torch.library.opcheck(
        torch.ops.distflash.attention_backward.default,
        (*plain, None if sinks is None else sinks.detach(), slopes, seed, LENGTHS, *options[5:]),
    )


def test_opcheck_with_max_logits():
    tensors = [torch.randn(2, S, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    cp = df.ContextParallel(Alone())
    arguments = (*tensors, None, None, None, LENGTHS, True, recipe_of(cp, max_logits=True), [], None, None)
    torch.library.opcheck(torch.ops.distflash.attention.default, arguments)
    *_, found = torch.ops.distflash.attention(*arguments)
    assert found.shape == (4,) and not found.requires_grad


def test_opcheck_of_positions():
    cp = df.ContextParallel(Alone())
    x, number = torch.randn(2, S, 8), recipe_of(cp)
    torch.library.opcheck(torch.ops.distflash.positions.default, (x, LENGTHS, number, [], None, None))
    assert torch.equal(torch.ops.distflash.positions(x, LENGTHS, number, [], None, None), cp.positions_of(x, S))
    with pytest.raises(ValueError, match=f"{S} local tokens, but Zigzag"):
        torch.ops.distflash.positions(x, [S + 1, 0, -1], number, [], None, None)


def module(cp=None):
    torch.manual_seed(0)
    return df.nn.SelfAttention(DIM, heads=4, kv_heads=2, cp=cp).double()


def gradients(function, attention, x):
    attention.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in attention.parameters())]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("cp", [None, df.ContextParallel(Alone())], ids=["alone", "group"])
def test_a_compiled_module_is_the_eager_one(cp):
    attention = module(cp)
    fast = compiled(attention)
    for seq_len in (S, S + 5, S + 6):  # the second length makes it dynamic
        x = torch.randn(2, seq_len, DIM, dtype=torch.float64)
        for got, expected in zip(gradients(fast, attention, x), gradients(attention, attention, x), strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)


def test_masks_made_inside_the_compiled_function():
    attention = module()

    def function(x, window):
        return attention(x, mask=df.Causal() & df.Window(window) & df.Documents([0, 5, S]))

    fast, x = compiled(function), torch.randn(1, S, DIM, dtype=torch.float64)
    for window in (1, 2, 3, 1):
        mask = df.Causal() & df.Window(window) & df.Documents([0, 5, S])
        torch.testing.assert_close(fast(x, window), attention(x, mask=mask), **CLOSE)


def test_masks_given_to_the_compiled_function():
    attention = module()
    fast, x = compiled(lambda x, mask: attention(x, mask=mask)), torch.randn(1, S, DIM, dtype=torch.float64)
    for mask in (df.Causal(), df.Window(2), df.Documents([0, 5, S]), df.Documents([0, 7, S]), df.Causal()):
        torch.testing.assert_close(fast(x, mask), attention(x, mask=mask), **CLOSE)


def test_two_groups_on_the_same_code_are_not_mixed_up():
    kernels = Counting(), Counting()
    groups = [df.ContextParallel(Alone(), kernel=kernel) for kernel in kernels]
    fast = compiled(lambda q, k, v, cp: df.attention(q, k, v, cp=cp))
    q, k, v = torch.randn(3, 1, S, 2, 8)
    for n in (0, 1, 1, 0, 1):
        fast(q, k, v, groups[n])
    assert [kernel.forwards for kernel in kernels] == [2, 3]


def test_a_compiled_graph_outlives_other_masks():
    cp = df.ContextParallel(Alone())
    fast = compiled(lambda q, k, v: df.attention(q, k, v, mask=df.Window(3), cp=cp))
    q, k, v = torch.randn(3, 1, S, 2, 8)
    first = fast(q, k, v)
    for left in range(4, 60):  # more than are kept for eager calls
        df.attention(q, k, v, mask=df.Window(left), cp=cp)
    gc.collect()
    torch.testing.assert_close(fast(q, k, v), first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_inside(dtype):
    """What autocast casts are the inputs, before the call: the kernel's own products are in the dtype it chose."""
    q, k, v = torch.randn(3, 1, S, 2, 8, dtype=dtype).unbind()
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def out_and_gradients(*, autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = df.attention(q, k, v, mask=df.Causal())
            return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    for cast, plain in zip(out_and_gradients(autocast=True), out_and_gradients(autocast=False), strict=True):
        assert torch.equal(cast, plain)


def test_gradcheck():
    q, k, v = (torch.randn(1, 5, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, sinks):
        return df.attention(q, k, v, mask=df.Causal(), sinks=sinks, softcap=3.0, return_lse=True)

    torch.autograd.gradcheck(function, (q, k, v, sinks))


def test_tensors_without_data_have_shapes():
    """Also outside fake modes: models are built on the meta device."""
    q, k, v = (torch.empty(2, 9, heads, 16, device="meta", requires_grad=True) for heads in (4, 2, 2))
    out, lse = df.attention(q, k, v, mask=df.Causal(), return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 9) and out.is_meta
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_what_is_watched_goes_through_the_op(monkeypatch):
    """A dispatch mode sees attention as one operation; eager code that nobody watches does not go through it."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q, k, v = torch.randn(3, 1, 9, 2, 16)
    with Watch():
        watched = df.attention(q, k, v, mask=df.Causal())
    assert ops.ATTENTION in seen
    monkeypatch.setattr(ops, "attention", None)  # whoever calls it fails
    assert torch.equal(watched, df.attention(q, k, v, mask=df.Causal()))
