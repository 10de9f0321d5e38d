"""Forward and backward of attention by a `ChunkwisePlan`: the same kernel calls on any number of ranks.

Every kernel call gets contiguous copies: torch's matrix products depend on strides and alignment in their last bits.

[Note: shapes] B batch, T local queries, K local keys, H query heads, G key/value heads, D head dim of q and k, V of v.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.chunkwise_plan import ChunkwisePlan, GatheredChunks, Piece
from distflash.exchange import Exchange, Tensors, copy_of, token_dim
from distflash.gradients import of_sinks
from distflash.kernels import Kernel
from distflash.kernels.base import BackwardContext, KeyGradient, Keys, QueryGradient, Scores
from distflash.partial import Partial, accumulator_dtype
from distflash.plan import Gradients, Pass, Stage, What
from distflash.transport import Message, PointToPoint


@dataclass(frozen=True)
class Chunkwise:
    """A call on one rank; its attributes are those of `engine.Call`."""

    plan: ChunkwisePlan
    transport: PointToPoint
    kernel: Kernel
    scores: Scores
    rounds_keys: bool
    max_logits: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `engine.forward`."""
        B, T, H, _ = q.shape
        out, lse = q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=accumulator_dtype(q.dtype))
        logits = lse.new_full((H,), -torch.inf) if self.max_logits else None
        if not B:  # on every rank
            return out, lse, logits
        exchange = self._exchanged(self.plan.forward, {What.KEYS: (k, v)})
        keys = self._in_order(self.plan.keys, What.KEYS, exchange)
        for piece in self.plan.of_queries:
            partial = self._attended(copy_of(q, (piece.own,)), _beside(piece, keys), piece)
            out[:, piece.own.start : piece.own.stop] = partial.final
            lse[:, :, piece.own.start : piece.own.stop] = partial.lse
            if logits is not None:
                logits = torch.maximum(logits, partial.max_logits(self.kernel.base))
        return out, lse, logits

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `engine.backward`. Rank 0 has the gradient of the sinks, summed over all ranks; the others have 0."""
        dq, dk, dv = q.new_empty(q.shape), *(x.new_empty(x.shape, dtype=self._of_keys(x)) for x in (k, v))
        sinks = self.scores.sinks
        if not q.shape[0]:
            return dq, dk, dv, None if sinks is None else torch.zeros_like(sinks)
        dlse = torch.zeros_like(lse) if dlse is None else dlse  # all ranks send the same tensors
        queries = tuple(x.contiguous() for x in (q, out, lse, dout, dlse))
        exchange = self._exchanged(self.plan.backward, {What.KEYS: (k, v), What.QUERIES: queries})
        keys = self._in_order(self.plan.keys, What.KEYS, exchange)
        of_sinks_by_chunk = []
        for piece in self.plan.of_queries:
            saved = self.kernel.preprocess(*_copies(queries, piece))
            dq[:, piece.own.start : piece.own.stop] = self._of_a_query_chunk(saved, _beside(piece, keys), piece)
            if sinks is not None:
                of_sinks_by_chunk.append(of_sinks(saved, sinks))
        del keys
        seen_by = self._in_order(self.plan.queries, What.QUERIES, exchange)
        for piece in self.plan.of_keys:
            found = self._of_a_key_chunk(_beside(piece, seen_by), _copies((k, v), piece), piece)
            for whole, part in zip((dk, dv), found, strict=True):
                whole[:, piece.own.start : piece.own.stop] = part
        return dq, dk, dv, None if sinks is None else self._sum_over_ranks(of_sinks_by_chunk, sinks, lse.dtype)

    def _attended(self, q: Tensor, kv: Tensors, piece: Piece) -> Partial:
        """A chunk of queries over all keys that it sees."""
        passes = self.plan.passes_over(piece, Gradients.ALL)
        into = Partial.empty(q, kv[1].shape[-1], between=len(passes) > 1, maxima=self.max_logits)
        if not passes:
            into.fill_identity(self.scores.sinks, self.kernel.base)
        for each in passes:
            self.kernel.forward(q, (_keys(kv, each),), each, self.scores, into)
        return into

    def _of_a_query_chunk(self, saved: BackwardContext, kv: Tensors, piece: Piece) -> Tensor:
        """The gradient of a chunk of queries, rounded."""
        passes = self.plan.passes_over(piece, Gradients.OF_QUERIES)
        final = saved.q.new_empty(saved.q.shape) if passes else saved.q.new_zeros(saved.q.shape)
        into = QueryGradient(final, _between(saved, passes))
        separate = self.kernel.abilities(saved.q.device).separate_gradients
        for each in passes:
            keys = _keys(kv, each)
            # A kernel that computes all gradients at once writes dK and dV, too.
            unused = (x[:, :0] if separate else torch.empty_like(x) for x in (keys.k, keys.v))
            self.kernel.backward(saved, keys, each, self.scores, into, KeyGradient(*unused))
        return final

    def _of_a_key_chunk(self, queries: Tensors, kv: Tensors, piece: Piece) -> Tensors:
        """Gradients of a chunk of keys: the pass of the mask's first part writes them, the others add."""
        passes = self.plan.passes_over(piece, Gradients.OF_KEYS)
        if not passes:
            return tuple(torch.zeros_like(x) for x in kv)
        saved = self.kernel.preprocess(*queries)
        unused = QueryGradient(torch.empty_like(saved.q), _between(saved, passes))
        wide = accumulator_dtype(saved.q.dtype)
        total: Tensors = ()
        for each in passes:
            keys = _keys(kv, each)
            dtypes = (self._of_keys(x) if len(passes) == 1 else wide for x in kv)
            part = KeyGradient(
                *(x.new_empty(x.shape, dtype=dtype) for x, dtype in zip((keys.k, keys.v), dtypes, strict=True))
            )
            self.kernel.backward(saved, keys, each, self.scores, unused, part)
            some = each.visible[0].keys
            for whole, x in zip(total, (part.dk, part.dv), strict=True) if each.adds else ():
                whole[:, some.start : some.stop] += x
            total = total if each.adds else (part.dk, part.dv)
        return total

    def _of_keys(self, x: Tensor) -> torch.dtype:
        """The dtype of dK and dV."""
        return x.dtype if self.rounds_keys else accumulator_dtype(x.dtype)

    def _exchanged(self, stages: tuple[Stage, ...], tensors: dict[What, Tensors]) -> Exchange:
        """Local tensors, and the remote ones that this rank's kernel calls read."""
        exchange = Exchange(self.plan, self.transport, tensors)
        exchange.tensors |= {(what, self.plan.rank): own for what, own in tensors.items()}
        for _ in exchange.walk(stages, [frozenset()] * len(stages)):
            pass
        return exchange

    def _in_order(self, gathered: GatheredChunks, what: What, exchange: Exchange) -> Tensors:
        """Local and received tokens in the order of positions. Receive buffers are freed."""
        rank = self.plan.rank
        own = tuple(copy_of(x, gathered.own) for x in exchange.tensors[what, rank])
        by_rank = [own if source == rank else exchange.tensors.pop((what, source)) for source in gathered.ranks]
        together = zip(*by_rank, strict=True) if by_rank else ((x,) for x in own)
        return tuple(_ordered(tensors, gathered.order) for tensors in together)

    def _sum_over_ranks(self, by_chunk: list[Tensor], sinks: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over the chunks of all ranks, in the order of positions, on rank 0."""
        plan, transport = self.plan, self.transport
        own = torch.stack(by_chunk) if by_chunk else sinks.new_empty(0, len(sinks), dtype=dtype)
        if plan.rank:
            transport.exchange([Message(own, 0, _OF_SINKS)] if len(own) else [], []).wait()
            return torch.zeros_like(sinks)
        counts = Counter(plan.owners)
        arriving = {rank: own.new_empty(counts[rank], len(sinks)) for rank in sorted(counts) if rank}
        transport.exchange([], [Message(x, rank, _OF_SINKS) for rank, x in arriving.items()]).wait()
        rows = {rank: iter(x) for rank, x in (arriving | {0: own}).items()}
        in_order = [next(rows[rank]) for rank in plan.owners]
        return torch.stack(in_order).sum(0).to(sinks.dtype) if in_order else torch.zeros_like(sinks)


_OF_SINKS = "the gradients of sinks"


def _beside(piece: Piece, in_order: Tensors) -> Tensors:
    return tuple(copy_of(x, piece.others) for x in in_order)


def _copies(tensors: Tensors, piece: Piece) -> Tensors:
    return tuple(copy_of(x, (piece.own,)) for x in tensors)


def _keys(kv: Tensors, each: Pass) -> Keys:
    (rows,) = each.visible
    k, v = (x[:, rows.keys.start : rows.keys.stop] for x in kv)
    return Keys(k, v, rows)


def _between(saved: BackwardContext, passes: tuple[Pass, ...]) -> Tensor | None:
    """The buffer of dQ between passes."""
    if len(passes) < 2 or saved.dq_accum is not None:
        return None
    return saved.q.new_empty(saved.q.shape, dtype=accumulator_dtype(saved.q.dtype))


def _ordered(tensors: tuple[Tensor, ...], order: Tensor) -> Tensor:
    dim = token_dim(tensors[0])
    return torch.cat(tensors, dim).index_select(dim, order)
