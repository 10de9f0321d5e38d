"""Autograd and custom-op registration: what `torch.compile`, fake tensors and checkpoint policies see.

Two ops, ``distflash::attention`` and its backward. A custom op takes tensors and numbers only, so what else makes a
call (mask, layout, ranks, kernel) is a `Recipe`, found by its number, and in compiled graphs its `compiled.Data` beside
it. The table of live recipes is weak: a recipe goes with the `ContextParallel` that made it.

[Note: arguments] Both ops take ``seq_len``, the global length, None where the recipe finds it; ``recipe``, its number;
``ints, boundaries, numbers``, the fields of `compiled.Data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distflash import engine
from distflash.compiled import Data
from distflash.partial import accumulator_dtype
from distflash.transport import during


class Recipe(Protocol):
    """Makes the call from what only the tensors tell."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, options: engine.Options, needs_grad: bool
    ) -> tuple[engine.Call, int]: ...

    def backward(self, q: Tensor, k: Tensor, v: Tensor, options: engine.Options, number: Tensor) -> engine.Call: ...

    def positions(self, x: Tensor, seq_len: int | None) -> Tensor: ...


class Fillable(Protocol):
    """A recipe, once it has its data: those of `compiled.Data`, none outside compiled graphs."""

    @property
    def numbered(self) -> bool:
        """Whether the forward's number has to reach the backward."""
        ...

    def filled(self, data: Data) -> Recipe: ...


_recipes: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count(1)


def new_number() -> int:
    """A number that no other recipe or group of this process has."""
    return next(_numbers)


def register(recipe: Fillable) -> int:
    """A number by which the ops find ``recipe`` for as long as it lives."""
    number = new_number()
    _recipes[number] = recipe
    return number


@torch.library.custom_op("distflash::positions", mutates_args=())
def positions(
    x: Tensor, seq_len: int | None, recipe: int, ints: Sequence[int], boundaries: Tensor | None, numbers: Tensor | None
) -> Tensor:
    """Global positions, int64 ``[T]``, of the tokens in ``x [B, T, ...]``; see [Note: arguments]."""
    return _recipes[recipe].filled(Data(ints, boundaries, numbers)).positions(x, seq_len)


@positions.register_fake
def _(
    x: Tensor, seq_len: int | None, recipe: int, ints: Sequence[int], boundaries: Tensor | None, numbers: Tensor | None
) -> Tensor:
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
    seq_len: int | None,
    needs_grad: bool,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse)`` of `engine.forward`, and the call's number, int64 ``[1]``, empty where no backward asks for it.

    See [Note: arguments]. needs_grad: whether a backward may follow, which ranks must have alike.
    """
    options = engine.Options(seq_len, sinks, alibi_slopes)
    made = _recipes[recipe]
    call, number = made.filled(Data(ints, boundaries, numbers)).forward(q, k, v, options, needs_grad)
    with _no_autocast(q), during(call.transport, "forward", q):
        out, lse = engine.forward(q, k.contiguous(), v.contiguous(), call)
    return out, lse, q.new_full((int(made.numbered),), number, dtype=torch.int64)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_len: int | None,
    needs_grad: bool,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    number = q.new_empty(int(_recipes[recipe].numbered), dtype=torch.int64)
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=accumulator_dtype(q.dtype)), number


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
    number: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_len: int | None,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dsinks)`` of `engine.backward`; dsinks is empty without sinks."""
    options = engine.Options(seq_len, sinks, alibi_slopes)
    call = _recipes[recipe].filled(Data(ints, boundaries, numbers)).backward(q, k, v, options, number)
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
    number: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_len: int | None,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, alibi_slopes, ctx.seq_len, _, ctx.recipe, ctx.ints, boundaries, numbers = inputs
    # A missing gradient of lse stays None, so that the common case, in which nobody uses lse, costs nothing.
    ctx.set_materialize_grads(False)
    # The recipe must outlive the graph even if its ContextParallel does not.
    ctx.keep = _recipes[ctx.recipe]
    # The number among the tensors: a forward that is recomputed is a call of its own, and brings its own.
    ctx.save_for_backward(q, k, v, *output, sinks, alibi_slopes, boundaries, numbers)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, number, sinks, alibi_slopes, boundaries, numbers = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 11
    dout = torch.zeros_like(out) if dout is None else dout
    data = ctx.ints, boundaries, numbers
    dq, dk, dv, dsinks = attention_backward(
        dout, dlse, q, k, v, out, lse, number, sinks, alibi_slopes, ctx.seq_len, ctx.recipe, *data
    )
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * 7


attention.register_autograd(_backward, setup_context=_setup_context)
