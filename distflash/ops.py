"""Autograd, and the custom ops that `torch.compile`, fake tensors and checkpoint policies see.

`call` is the entry point. In eager code it is a `torch.autograd.Function`, which costs the host a few microseconds.
Where a compiler, a dispatch mode or a tensor subclass has to see the op, it is a custom op, which costs more.

There are two ops, ``distflash::attention`` and its backward. A custom op takes only tensors and numbers, so the rest of
a call (mask, layout, ranks, kernel) is a `Recipe`, which is passed by its number; compiled graphs pass its
`compiled.Data` as well. The table of recipes holds weak references: a recipe lives as long as its `ContextParallel`.

[Note: arguments] Both ops take ``lengths``, see `given.Given`; ``recipe``, its number; ``ints, boundaries, numbers``,
the fields of `compiled.Data`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch

from distflash import attend
from distflash.call import Prepared, Template, templates
from distflash.compiled import NO_DATA, Data
from distflash.given import PLAIN, Given
from distflash.partial import accumulator_dtype
from distflash.profiling import within
from distflash.transport import Direction, Guarded, Transport, during

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN_TYPES = Tensor, torch.nn.Parameter


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


def _run(
    direction: Direction,
    transport: Transport,
    q: Tensor,
    work: Callable[P, R],
    *arguments: P.args,
    **keywords: P.kwargs,
) -> R:
    """``work(*arguments)``, the part of a call in which ranks wait for one another: see `during`.

    Without autocast, which would cast the matrix products of the plain-torch kernel to bfloat16.
    """
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind := q.device.type):
        with torch.autocast(kind, enabled=False):
            return _run(direction, transport, q, work, *arguments, **keywords)
    if not isinstance(transport, Guarded):
        return work(*arguments, **keywords)
    with during(transport, direction, q):
        return work(*arguments, **keywords)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, given: Given, prepared: Prepared
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(out, lse, max_logits)`` of `attend.forward`, and before the last the call's number, int64 ``[1]``, if the
    backward compares it.
    """
    (call, number), calls = prepared.forward_call(given), prepared.calls
    out, lse, max_logits = _run("forward", calls.transport, q, attend.forward, q, k, v, call)
    return out, lse, q.new_full((1,), number, dtype=torch.int64) if calls.numbered else None, max_logits


def _backward_of(
    dout: Tensor | None,
    dlse: Tensor | None,
    saved: Sequence[Tensor],
    number: Tensor | None,
    given: Given,
    prepared: Prepared,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dsinks)`` of `attend.backward`; saved: ``q, k, v, out, lse``."""
    q, k, v, out, lse = saved
    dout = torch.zeros_like(out) if dout is None else dout
    call = prepared.backward_call(given, number)
    transport = prepared.calls.transport
    return _run("backward", transport, q, attend.backward, dout, dlse, q, k, v, out, lse, call)


@torch.library.custom_op("distflash::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    lengths: Sequence[int],
    needs_grad: bool,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out, lse, number, max_logits)``: `attend.forward`, and the call's number, int64 ``[1]``, empty if no backward
    compares it. max_logits is empty without `Options.max_logits`.

    See [Note: arguments]. needs_grad: whether a backward may follow; the same on all ranks.
    """
    given = Given(lengths, sinks, alibi_slopes, dropout_seed)
    made = templates[recipe].filled(Data(ints, boundaries, numbers))
    out, lse, number, max_logits = _forward(q, k, v, given, made.prepared(q, k, v, given, needs_grad))
    number = q.new_empty(0, dtype=torch.int64) if number is None else number
    return out, lse, number, lse.new_empty(0) if max_logits is None else max_logits


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    lengths: Sequence[int],
    needs_grad: bool,
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    number = q.new_empty(int(templates[recipe].numbered), dtype=torch.int64)
    lse = q.new_empty(B, H, T, dtype=accumulator_dtype(q.dtype))
    return q.new_empty(B, T, H, v.shape[-1]), lse, number, lse.new_empty(H if _wants_max_logits(recipe) else 0)


def _wants_max_logits(recipe: int) -> bool:
    made = templates[recipe]
    return made.form.max_logits if isinstance(made, Template) else made.filled(NO_DATA).options.max_logits


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
    dropout_seed: Tensor | None,
    lengths: Sequence[int],
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dsinks)`` of `attend.backward`; dsinks is empty without sinks."""
    given = Given(lengths, sinks, alibi_slopes, dropout_seed)
    made = templates[recipe].filled(Data(ints, boundaries, numbers)).prepared(q, k, v, given, True)
    compared = number if number.numel() else None
    dq, dk, dv, dsinks = _backward_of(dout, dlse, (q, k, v, out, lse), compared, given, made)
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
    dropout_seed: Tensor | None,
    lengths: Sequence[int],
    recipe: int,
    ints: Sequence[int],
    boundaries: Tensor | None,
    numbers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, sinks, alibi_slopes, dropout_seed, ctx.lengths, _, ctx.recipe, ctx.ints, boundaries, numbers = inputs
    # A missing gradient of lse stays None: usually lse is not used, and a tensor of zeros would cost time.
    ctx.set_materialize_grads(False)
    # The recipe must outlive the graph even if its ContextParallel does not.
    ctx.keep = templates[ctx.recipe]
    # The number is saved as a tensor, because a recomputed forward is another call with another number.
    *kept, max_logits = output
    ctx.mark_non_differentiable(max_logits)
    ctx.save_for_backward(q, k, v, *kept, sinks, alibi_slopes, dropout_seed, boundaries, numbers)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, number, sinks, alibi_slopes, dropout_seed, boundaries, numbers = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 12
    dout = torch.zeros_like(out) if dout is None else dout
    data = ctx.ints, boundaries, numbers
    dq, dk, dv, dsinks = attention_backward(
        dout, dlse, q, k, v, out, lse, number, sinks, alibi_slopes, dropout_seed, ctx.lengths, ctx.recipe, *data
    )
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * 8


attention.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The op ``distflash::attention`` with its gradient, as an autograd function for eager code."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, given: Given, prepared: Prepared
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.prepared = prepared
        ctx.set_materialize_grads(False)
        out, lse, number, max_logits = within("attention", _forward, q, k, v, given, prepared)
        ctx.save_for_backward(q, k, v, out, lse, number, sinks, given.alibi_slopes, given.dropout_seed)
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)
        return out, lse, max_logits

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *saved, number, sinks, alibi_slopes, dropout_seed = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        has_others = sinks is not None or alibi_slopes is not None or dropout_seed is not None
        given = Given((), sinks, alibi_slopes, dropout_seed) if has_others else PLAIN
        arguments = dout, dlse, saved, number, given, ctx.prepared
        if not torch.is_grad_enabled():
            return *within("attention_backward", _backward_of, *arguments), None, None
        with torch.no_grad():
            found = within("attention_backward", _backward_of, *arguments)
        return *_First.apply(*found, dout, dlse, *saved, sinks), None, None


# `Function.apply` without what it does for the transforms of torch.func, which `is_watched` has excluded.
_apply_eager = super(torch.autograd.Function, _Eager).apply


class _First(torch.autograd.Function):
    """First derivatives, whose own derivatives raise. Its inputs are those that second derivatives could be taken of.

    `torch.autograd.function.once_differentiable` does not have them as inputs, so a second derivative with respect to
    one of them would be None instead of an error.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        return tensors[:4]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise RuntimeError(
            "attention: its gradients are asked to differentiate twice, which is not supported; only first derivatives "
            "by a backward pass are"
        )


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    lengths: Sequence[int],
    recipe: int,
    data: Data,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(out, lse, max_logits)`` of a call. The first two are differentiable; the last may be None or empty.

    lengths: see `given.Given`; recipe, data: see [Note: arguments].
    """
    tensors = q, k, v, sinks, alibi_slopes
    if is_watched(*tensors):
        needs_grad = _needs_grad(*tensors)
        out, lse, _, max_logits = attention(*tensors, dropout_seed, lengths, needs_grad, recipe, *data)
        return out, lse, max_logits
    given = Given(lengths, sinks, alibi_slopes, dropout_seed)
    return eager(q, k, v, given, prepare(q, k, v, given, recipe, data))


def prepare(q: Tensor, k: Tensor, v: Tensor, given: Given, recipe: int, data: Data) -> Prepared:
    """What `eager` takes. recipe, data: see [Note: arguments]."""
    needs_grad = _needs_grad(q, k, v, given.sinks, given.alibi_slopes)
    return templates[recipe].filled(data).prepared(q, k, v, given, needs_grad)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def eager(q: Tensor, k: Tensor, v: Tensor, given: Given, prepared: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
    """`call` with what was prepared for it, in code that nothing watches."""
    if prepared.specification.needs_grad:
        found: tuple[Tensor, Tensor, Tensor | None] = _apply_eager(q, k, v, given.sinks, given, prepared)
        return found
    out, lse, _, max_logits = within("attention", _forward, q, k, v, given, prepared)
    return out, lse, max_logits


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a dispatch mode, a transform, a tensor subclass or a meta tensor needs the custom op."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return True
    if _functorch.peek_interpreter_stack() is not None:
        return True
    for x in tensors:
        # A tensor that has left its transform is a wrapper still.
        if x is not None and (type(x) not in _PLAIN_TYPES or x.is_meta or _functorch.is_functorch_wrapped_tensor(x)):
            return True
    return False
