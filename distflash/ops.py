"""Autograd and custom-op registration: what `torch.compile`, fake tensors and checkpoint policies see.

Two ops, ``distflash::attention`` and its backward. A custom op takes tensors and numbers only, so what else makes a
call (mask, layout, ranks, kernel) is a `Recipe`, found by its number. The table of live recipes is weak: a recipe goes
with the `ContextParallel` that made it.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distflash import engine
from distflash.partial import accumulator_dtype
from distflash.transport import during


class Recipe(Protocol):
    """Makes the call from what only the tensors tell."""

    def call(self, q: Tensor, k: Tensor, v: Tensor, options: engine.Options, *, agree: bool) -> engine.Call: ...

    def positions(self, x: Tensor, seq_len: int) -> Tensor: ...


_recipes: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count(1)


def new_number() -> int:
    """A number that no other recipe or group of this process has."""
    return next(_numbers)


def register(recipe: Recipe) -> int:
    """A number by which the ops find ``recipe`` for as long as it lives."""
    number = new_number()
    _recipes[number] = recipe
    return number


@torch.library.custom_op("distflash::positions", mutates_args=())
def positions(x: Tensor, seq_len: int, recipe: int) -> Tensor:
    """Global positions, int64 ``[T]``, of the tokens in ``x [B, T, ...]``."""
    return _recipes[recipe].positions(x, seq_len)


@positions.register_fake
def _(x: Tensor, seq_len: int, recipe: int) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.int64)


def _no_autocast(q: Tensor) -> torch.autocast:
    """Kernels choose the dtypes they compute in: products of a kernel in plain torch must not be cast to bfloat16."""
    return torch.autocast(q.device.type, enabled=False)


@torch.library.custom_op("distflash::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_len: int,
    recipe: int,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of `engine.forward`."""
    options = engine.Options(seq_len, sinks, alibi_slopes)
    call = _recipes[recipe].call(q, k, v, options, agree=True)
    with _no_autocast(q), during(call.transport, "forward", q):
        return engine.forward(q, k.contiguous(), v.contiguous(), call)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_len: int,
    recipe: int,
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=accumulator_dtype(q.dtype))


# As dispatch modes and checkpoint policies see it.
ATTENTION = torch.ops.distflash.attention.default


@torch.library.custom_op("distflash::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_len: int,
    recipe: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dsinks)`` of `engine.backward`; dsinks is empty without sinks."""
    options = engine.Options(seq_len, sinks, alibi_slopes)
    call = _recipes[recipe].call(q, k, v, options, agree=False)
    with _no_autocast(q), during(call.transport, "backward", q):
        dq, dk, dv, dsinks = engine.backward(dout, dlse, q, k.contiguous(), v.contiguous(), out, lse, call)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@attention_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_len: int,
    recipe: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, alibi_slopes, ctx.seq_len, ctx.recipe = inputs
    out, lse = output
    # A missing gradient of lse stays None, so that the common case, in which nobody uses lse, costs nothing.
    ctx.set_materialize_grads(False)
    # The recipe must outlive the graph even if its ContextParallel does not.
    ctx.keep = _recipes[ctx.recipe]
    ctx.save_for_backward(q, k, v, sinks, alibi_slopes, out, lse)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, alibi_slopes, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 7
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = attention_backward(dout, dlse, q, k, v, out, lse, sinks, alibi_slopes, ctx.seq_len, ctx.recipe)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)
