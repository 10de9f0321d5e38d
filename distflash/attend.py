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


@dataclass(frozen=True)
class PlacedCall:
    """A call of the engine, with the placements around it.

    Attributes:
        call: the call on redistributed tensors.
        placements: applied in order to the inputs, and inverted in reverse order on the results.
        heads: the number of query heads of the user's tensors.
        some: the query heads that this rank's call has.
    """

    call: Call
    placements: tuple[Placement, ...]
    heads: int
    some: slice


def forward(q: Tensor, k: Tensor, v: Tensor, placed: PlacedCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, see `engine.forward`."""
    k, v = k.contiguous(), v.contiguous()
    if not placed.placements:
        return _forward(q, k, v, placed.call)
    with named("placement inward"):
        (q,), (k, v), _ = inward(placed.placements, Held((q,), (k, v)))
    out, lse = _forward(q, k, v, placed.call)
    with named("placement outward"):
        seen = outward(placed.placements, Held(queries=(out,), numbers=(lse,)))
    return seen.queries[0], seen.numbers[0]


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, placed: PlacedCall
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dsinks)``, see `engine.backward`."""
    dtype, k, v = k.dtype, k.contiguous(), v.contiguous()
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


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
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
    return Chunkwise(plan, call.transport, call.kernel, call.scores, call.rounds_keys)


def _of_all_heads(dsinks: Tensor | None, placed: PlacedCall) -> Tensor | None:
    """This rank's part of the gradient: zero for heads whose gradient other ranks have."""
    if dsinks is None or len(dsinks) == placed.heads:
        return dsinks
    whole = dsinks.new_zeros(placed.heads)
    whole[placed.some] = dsinks
    return whole
