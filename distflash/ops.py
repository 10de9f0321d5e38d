"""Autograd and custom-op registration: what `torch.compile`, fake tensors and checkpoint policies see.

Two ops, ``distflash::attention`` and its backward. A custom op takes tensors and numbers only, so what else makes a
call (mask, layout, ranks, kernel) is a `Recipe`, found by its number, and in compiled graphs its `compiled.Data` beside
it. The table of live recipes is weak: a recipe goes with the `ContextParallel` that made it.

[Note: arguments] Both ops take ``lengths``, see `call.Given`; ``recipe``, its number; ``ints, boundaries, numbers``,
the fields of `compiled.Data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distflash import attend
from distflash.call import Given, templates
from distflash.compiled import Data
from distflash.partial import accumulator_dtype
from distflash.transport import during


@torch.library.custom_op("distflash::positions", mutates_args=())
def positions(
    x: Tensor,
    lengths: Sequence[int],
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> Tensor:
    """Global positions, int64 ``[T]``, of the tokens in ``x [B, T, ...]``; see [Note: arguments]."""
    return templates[recipe].filled(Data(ints, boundaries, numbers)).positions(x, lengths)


@positions.register_fake
def _(
    x: Tensor,
    lengths: Sequence[int],
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
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
    lengths: Sequence[int],
    needs_grad: bool,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse)`` of `attend.forward`, and the call's number, int64 ``[1]``, empty where no backward asks for it.

    See [Note: arguments]. needs_grad: whether a backward may follow, which ranks must have alike.
    """
    given = Given(lengths, sinks, alibi_slopes)
    made = templates[recipe]
    call, number = made.filled(Data(ints, boundaries, numbers)).forward(q, k, v, given, needs_grad)
    with _no_autocast(q), during(made.calls.transport, "forward", q):
        out, lse = attend.forward(q, k, v, call)
    return out, lse, q.new_full((int(made.numbered),), number, dtype=torch.int64)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    lengths: Sequence[int],
    needs_grad: bool,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    number = q.new_empty(int(templates[recipe].numbered), dtype=torch.int64)
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
    lengths: Sequence[int],
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dsinks)`` of `attend.backward`; dsinks is empty without sinks."""
    given = Given(lengths, sinks, alibi_slopes)
    made = templates[recipe]
    call = made.filled(Data(ints, boundaries, numbers)).backward(q, k, v, given, number)
    with _no_autocast(q), during(made.calls.transport, "backward", q):
        dq, dk, dv, dsinks = attend.backward(dout, dlse, q, k, v, out, lse, call)
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
    lengths: Sequence[int],
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, alibi_slopes, ctx.lengths, _, ctx.recipe, ctx.ints, boundaries, numbers = inputs
    # A missing gradient of lse stays None, so that the common case, in which nobody uses lse, costs nothing.
    ctx.set_materialize_grads(False)
    # The recipe must outlive the graph even if its ContextParallel does not.
    ctx.keep = templates[ctx.recipe]
    # The number among the tensors: a forward that is recomputed is a call of its own, and brings its own.
    ctx.save_for_backward(q, k, v, *output, sinks, alibi_slopes, boundaries, numbers)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, number, sinks, alibi_slopes, boundaries, numbers = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 11
    dout = torch.zeros_like(out) if dout is None else dout
    data = ctx.ints, boundaries, numbers
    dq, dk, dv, dsinks = attention_backward(
        dout, dlse, q, k, v, out, lse, number, sinks, alibi_slopes, ctx.lengths, ctx.recipe, *data
    )
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * 7


attention.register_autograd(_backward, setup_context=_setup_context)
