"""The best ring that can be put together of others' kernels: zigzag shards, each hop one call of a flash kernel.

Under a causal mask and zigzag shards a rank sees its own keys causally; of a rank before it, the first half of the keys
with all its queries; of a rank after it, all keys with the second half of its queries. So every hop is one call that is
causal or full, and any kernel that returns its log-sum-exp will do; the idea is that of ring-flash-attn. Keys travel
from neighbour to neighbour while the hop before computes, and each part of dK and dV goes straight home to its owner.

What such a ring cannot help: a kernel hands over each hop's output and gradients rounded to the input's dtype, and
merging is one more pass over memory.

[Note: shapes] q, out, dout ``[B, T, H, D]``, k, v ``[B, T, G, D]``, lse ``[B, H, T]``, T even and equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import distflash as df
from benchmarks.contest import Candidate
from benchmarks.peers.local import require
from distflash.transport import Message, Pending, Transport

_ALL = slice(None)


class Flash(Protocol):
    """A kernel for one hop, on as many queries as keys, or on all or half of either."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """``(out, lse)``."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, ...]:
        """``(dq, dk, dv)``, from the log-sum-exp of all hops."""
        ...

    def merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """``out, lse`` become those of both partial softmaxes together, in place."""
        ...


@dataclass(frozen=True)
class Block:
    """The queries and keys of one hop."""

    rows: slice
    keys: slice
    causal: bool = False

    @staticmethod
    def of(step: int, rank: int, half: int) -> Block:
        """What ``rank`` computes with the keys of the rank ``step`` places before it."""
        if step == 0:
            return Block(_ALL, _ALL, causal=True)
        if step <= rank:
            return Block(_ALL, slice(0, half))
        return Block(slice(half, None), _ALL)


class _Keys:
    """K and V on their way round."""

    def __init__(self, transport: Transport, k: Tensor, v: Tensor) -> None:
        self.transport, self.held = transport, (k, v)

    @contextmanager
    def at(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """The keys and values of a step, while those of the next arrive and these go on to the next rank."""
        me, W = self.transport.rank, self.transport.world_size
        if step + 1 == W:
            yield self.held
            return
        arriving = tuple(torch.empty_like(x) for x in self.held)
        sends = [Message(x, (me + 1) % W) for x in self.held]
        pending = self.transport.exchange(sends, [Message(x, (me - 1) % W) for x in arriving])
        try:
            yield self.held
        finally:
            pending.wait()  # also where a kernel refuses: nothing stays in flight
            self.held = arriving


def forward(q: Tensor, k: Tensor, v: Tensor, transport: Transport, flash: Flash) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of this rank's queries over all ranks' keys, causally."""
    out, lse = q, q  # both are replaced in the first step
    keys = _Keys(transport, k, v)
    for step in range(transport.world_size):
        at = Block.of(step, transport.rank, q.shape[1] // 2)
        with keys.at(step) as held:
            part, part_lse = flash.forward(q[:, at.rows], *(x[:, at.keys] for x in held), at.causal)
            if step == 0:
                out, lse = _sum_of(part, transport), part_lse
            else:
                flash.merge(out[:, at.rows], lse[:, :, at.rows], part, part_lse)
    return out.to(q.dtype), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, transport: Transport, flash: Flash
) -> tuple[Tensor, ...]:
    """``(dq, dk, dv)`` of this rank's tokens."""
    rank, W, half = transport.rank, transport.world_size, q.shape[1] // 2
    dq, dkv, home = q, (k, v), _Home(slice(0), ())  # all three are replaced in the first steps
    keys = _Keys(transport, k, v)
    for step in range(W):
        at = Block.of(step, rank, half)
        queries = (x[:, at.rows] for x in (dout, q))
        rest = (out[:, at.rows], lse[:, :, at.rows].contiguous())
        with keys.at(step) as held:
            part, *parts = flash.backward(*queries, *(x[:, at.keys] for x in held), *rest, at.causal)
            if step == 0:
                dq, dkv = _sum_of(part, transport), tuple(_sum_of(x, transport) for x in parts)
            else:
                dq[:, at.rows] += part
                home.add_to(dkv)
                home = _Home.start(step, parts, (k, v), transport)
    home.add_to(dkv)
    return tuple(x.to(q.dtype) for x in (dq, *dkv))


@dataclass
class _Home:
    """One hop's parts of dK and dV: this rank's on their way to their owner, another's on their way here."""

    keys: slice
    arriving: tuple[Tensor, ...]
    pending: Pending | None = None

    @staticmethod
    def start(step: int, parts: list[Tensor], like: tuple[Tensor, ...], transport: Transport) -> _Home:
        owner, source = ((transport.rank + n) % transport.world_size for n in (-step, step))
        keys = Block.of(step, source, like[0].shape[1] // 2).keys
        arriving = tuple(torch.empty_like(x[:, keys], memory_format=torch.contiguous_format) for x in like)
        sends = [Message(part.contiguous(), owner) for part in parts]
        return _Home(keys, arriving, transport.exchange(sends, [Message(x, source) for x in arriving]))

    def add_to(self, dkv: tuple[Tensor, ...]) -> None:
        if self.pending is None:
            return
        self.pending.wait()
        for total, part in zip(dkv, self.arriving, strict=True):
            total[:, self.keys] += part


def _sum_of(first: Tensor, transport: Transport) -> Tensor:
    """What later parts are added to: float32, unless the second part is the last and the sum is rounded once anyway."""
    return first.float() if transport.world_size > 2 else first


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """See `Flash.merge`. Every row has seen a key before."""
    both = torch.logaddexp(lse, part_lse)
    old, new = (torch.exp(x - both).transpose(1, 2)[..., None] for x in (lse, part_lse))
    out.copy_(out.float() * old + part.float() * new)
    lse.copy_(both)


class FlashAttention4:
    """The two passes beneath flash-attn-4's autograd function, and a merge that is one kernel."""

    def __init__(self) -> None:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        self._forward, self._backward = _flash_attn_fwd, _flash_attn_bwd
        self.merge = torch.compile(merge, dynamic=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, causal=causal, return_lse=True)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, ...]:
        return tuple(self._backward(q=q, k=k, v=v, out=out, dout=dout, lse=lse, causal=causal)[:3])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, transport: Transport, flash: Flash) -> Tensor:
        out, lse = forward(q, k, v, transport, flash)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = transport, flash
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dout, *ctx.saved_tensors, *ctx.ring), None, None


def ring(transport: Transport, flash: Flash) -> Candidate:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        require(mask, df.Causal)
        return _Attention.apply(q, k, v, transport, flash)

    return Candidate(attend)
