"""Attention of a user's tensors: redistribution (`placement`), the engine, and redistribution of the results.

[Note: shapes] as in `engine`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash import engine
from distflash.chunkwise import Chunkwise
from distflash.chunkwise_plan import ChunkwisePlan
from distflash.engine import Call
from distflash.placement import Held, Placement, inward, outward
from distflash.profiling import named
from distflash.transport import Transport


@dataclass(frozen=True)
class PlacedCall:
    """A call of the engine, with the placements around it.

    Attributes:
        call: the call on redistributed tensors.
        placements: applied in order to the inputs, and inverted in reverse order on the results.
        heads: the number of query heads of the user's tensors.
        some: the query heads that this rank's call has.
        everyone: the ranks among which the largest scores are compared.
    """

    call: Call
    placements: tuple[Placement, ...]
    heads: int
    some: slice
    everyone: Transport


def forward(q: Tensor, k: Tensor, v: Tensor, placed: PlacedCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(out, lse, max_logits)``, see `engine.forward`; max_logits ``[heads]`` of all ranks, None if not asked for."""
    q, k, v = _as_in_memory(q, k, v)
    if placed.placements:
        with named("placement inward"):
            (q,), (k, v), _ = inward(placed.placements, Held((q,), (k, v)))
    out, lse, logits = _forward(q, k, v, placed.call)
    if placed.placements:
        with named("placement outward"):
            seen = outward(placed.placements, Held(queries=(out,), numbers=(lse,)))
        out, lse = seen.queries[0], seen.numbers[0]
    return out, lse, None if logits is None else _largest(logits, placed)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, placed: PlacedCall
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dsinks)``, see `engine.backward`."""
    dtype, dout = k.dtype, dout.resolve_neg()
    dlse = None if dlse is None else dlse.resolve_neg()
    q, k, v = _as_in_memory(q, k, v)
    if not placed.placements:
        return _backward(dout, dlse, q, k, v, out, lse, placed.call)
    dlse = torch.zeros_like(lse) if dlse is None else dlse  # all ranks send the same tensors
    held = Held((q, out, dout), (k, v), (lse, dlse))
    with named("placement inward"):
        (q, out, dout), (k, v), (lse, dlse) = inward(placed.placements, held)
    dq, dk, dv, dsinks = _backward(dout, dlse, q, k, v, out, lse, placed.call)
    with named("placement outward"):
        seen = outward(placed.placements, Held((dq,), (dk, dv)))
    dk, dv = (x.to(dtype) for x in seen.keys)
    return seen.queries[0], dk, dv, _of_all_heads(dsinks, placed)


def _as_in_memory(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As kernels and transports read them from memory: k and v contiguous, and no view that negates."""
    return q.resolve_neg(), k.contiguous().resolve_neg(), v.contiguous().resolve_neg()


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """By what the plan's passes are of: ranks or chunks."""
    if isinstance(call.plan, ChunkwisePlan):
        return _chunkwise(call, call.plan).forward(q, k, v)
    return engine.forward(q, k, v, call)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if isinstance(call.plan, ChunkwisePlan):
        return _chunkwise(call, call.plan).backward(dout, dlse, q, k, v, out, lse)
    return engine.backward(dout, dlse, q, k, v, out, lse, call)


def _chunkwise(call: Call, plan: ChunkwisePlan) -> Chunkwise:
    return Chunkwise(plan, call.transport, call.kernel, call.scores, call.rounds_keys, call.max_logits)


def _largest(logits: Tensor, placed: PlacedCall) -> Tensor:
    """``[heads]``: the maximum over all ranks, each of which knows that of its heads."""
    whole = logits.new_full((placed.heads,), -torch.inf)
    whole[placed.some] = logits
    with named("max_logits of all ranks"):
        return placed.everyone.gather_equal(whole).amax(0)


def _of_all_heads(dsinks: Tensor | None, placed: PlacedCall) -> Tensor | None:
    """This rank's part of the gradient: zero for heads whose gradient other ranks have."""
    if dsinks is None or len(dsinks) == placed.heads:
        return dsinks
    whole = dsinks.new_zeros(placed.heads)
    whole[placed.some] = dsinks
    return whole
