"""Attention of a user's tensors: from what ranks hold to what kernels see (`placement`), the engine, and back.

[Note: shapes] as in `engine`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash import engine
from distflash.engine import Call
from distflash.placement import Held, Placement, inward, outward


@dataclass(frozen=True)
class Attention:
    """A call of the engine, and the way there.

    Attributes:
        call: as kernels see it.
        placements: the changes on the way in, in order.
        heads: how many query heads the user's tensors have.
        some: those that the call has.
    """

    call: Call
    placements: tuple[Placement, ...]
    heads: int
    some: slice


def forward(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, see `engine.forward`."""
    k, v = k.contiguous(), v.contiguous()
    if not attention.placements:
        return engine.forward(q, k, v, attention.call)
    (q,), (k, v), _ = inward(attention.placements, Held((q,), (k, v)))
    out, lse = engine.forward(q, k, v, attention.call)
    seen = outward(attention.placements, Held(queries=(out,), numbers=(lse,)))
    return seen.queries[0], seen.numbers[0]


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attention: Attention
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dsinks)``, see `engine.backward`."""
    dtype, k, v = k.dtype, k.contiguous(), v.contiguous()
    if not attention.placements:
        return engine.backward(dout, dlse, q, k, v, out, lse, attention.call)
    dlse = torch.zeros_like(lse) if dlse is None else dlse  # what travels is alike on all ranks
    held = Held((q, out, dout), (k, v), (lse, dlse))
    (q, out, dout), (k, v), (lse, dlse) = inward(attention.placements, held)
    dq, dk, dv, dsinks = engine.backward(dout, dlse, q, k, v, out, lse, attention.call)
    seen = outward(attention.placements, Held((dq,), (dk, dv)))
    dk, dv = (x.to(dtype) for x in seen.keys)
    return seen.queries[0], dk, dv, _of_all_heads(dsinks, attention)


def _of_all_heads(dsinks: Tensor | None, attention: Attention) -> Tensor | None:
    """This rank's part of the gradient: that of other heads is on the ranks that see them."""
    if dsinks is None or len(dsinks) == attention.heads:
        return dsinks
    whole = dsinks.new_zeros(attention.heads)
    whole[attention.some] = dsinks
    return whole
