"""A ring built from other libraries' kernels: zigzag shards, each ring step one call of a flash kernel.

With a causal mask and zigzag shards, local keys are causal; of keys of a lower rank, all queries see the first half;
all keys of a higher rank are seen by the second half of the queries. So every ring step is one causal or full call, for
any kernel that returns its log-sum-exp, as in ring-flash-attn. Keys are sent to the neighbour during the previous
step's compute, and dK and dV are sent directly to their source.

Two limits of this design: a kernel rounds each step's output and gradients to the input's dtype, and merging is another
pass over memory.

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
from benchmarks.comparison import Candidate
from benchmarks.peers.local import require
from distflash.transport import Message, Pending, Transport

_ALL = slice(None)


class Flash(Protocol):
    """A kernel for one ring step, on all or half of the queries and keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """``(out, lse)``."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, ...]:
        """``(dq, dk, dv)``, from the log-sum-exp of all ring steps."""
        ...

    def merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """``out, lse`` become those of both partial softmaxes together, in place."""
        ...


@dataclass(frozen=True)
class Block:
    """The queries and keys of one ring step."""

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
    dq, dkv, pending = q, (k, v), _GradientExchange(slice(0), ())  # all three are replaced in the first steps
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
                pending.add_to(dkv)
                pending = _GradientExchange.start(step, parts, (k, v), transport)
    pending.add_to(dkv)
    return tuple(x.to(q.dtype) for x in (dq, *dkv))


@dataclass
class _GradientExchange:
    """dK and dV of one ring step in flight: sent to their source, and received from another rank."""

    keys: slice
    arriving: tuple[Tensor, ...]
    pending: Pending | None = None

    @staticmethod
    def start(step: int, parts: list[Tensor], like: tuple[Tensor, ...], transport: Transport) -> _GradientExchange:
        owner, source = ((transport.rank + n) % transport.world_size for n in (-step, step))
        keys = Block.of(step, source, like[0].shape[1] // 2).keys
        arriving = tuple(torch.empty_like(x[:, keys], memory_format=torch.contiguous_format) for x in like)
        sends = [Message(part.contiguous(), owner) for part in parts]
        return _GradientExchange(keys, arriving, transport.exchange(sends, [Message(x, source) for x in arriving]))

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
