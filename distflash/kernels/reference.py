"""The plain-torch kernel: any device, any floating dtype, tile by tile, never the whole score matrix.

It is the definition that the fast kernels are tested against, and the default on CPUs. Arithmetic is done in the
accumulator's dtype (float32; float64 for float64 inputs), so the only rounding to a short dtype is the last.

[Note: shapes] B batch, T local queries, K local keys, G key/value heads, R query heads per key head, t and n the
queries and keys of a tile, D head dim of q and k, V head dim of v. Inside a tile, heads come before tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.intervals import Intervals
from distflash.kernels.base import Hop, KeyGradient, Problem, QueryGradient, Saved, Scores
from distflash.partial import Partial, Softmax, accumulator_dtype


@dataclass(frozen=True)
class Reference:
    """Plain torch. ``block_q`` and ``block_k`` bound the memory of a tile: ``B * H * block_q * block_k`` numbers.

    Raises:
        ValueError: a block size is no int of at least 1.
    """

    block_q: int = 128
    block_k: int = 1024

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"Reference({name}): expected an int of at least 1, got {size!r}")

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if not problem.dtype.is_floating_point:
            reasons.append(f"dtype {problem.dtype} is not a floating-point dtype")
        if problem.dropout_p:
            reasons.append(f"dropout_p={problem.dropout_p} is not supported, only 0")
        return reasons

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Intervals, scores: Scores, hop: Hop, into: Partial
    ) -> None:
        tiles = _Tiles(rows, scores, q.shape[2], k.shape[2], accumulator_dtype(q.dtype))
        k, v = tiles.keys_first(k), tiles.keys_first(v)
        for block in self._blocks(rows):
            if not (block.keys or hop.first or hop.last):
                continue  # nothing to add, and what there is stays where it is
            softmax = _start(tiles, block, hop, scores, into)
            queries = tiles.queries(q, block.queries) * scores.scale
            for keys in block.keys:
                s, _ = tiles.scores(queries, k, block.queries, keys)
                softmax = softmax.merge(Softmax.of_scores(s, v[:, :, None, keys]))
            _store(tiles, block, hop, softmax, into)

    def save(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Saved:
        dtype = accumulator_dtype(out.dtype)
        delta = (out.to(dtype) * dout.to(dtype)).sum(-1).transpose(1, 2)
        return Saved(q, dout, lse, delta if dlse is None else delta - dlse)

    def backward(
        self,
        saved: Saved,
        k: Tensor,
        v: Tensor,
        rows: Intervals,
        scores: Scores,
        hop: Hop,
        dq: QueryGradient,
        dkv: KeyGradient,
        keys_done: Callable[[], None],
    ) -> None:
        tiles = _Tiles(rows, scores, saved.q.shape[2], k.shape[2], accumulator_dtype(k.dtype))
        k, v = tiles.keys_first(k), tiles.keys_first(v)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for block in self._blocks(rows):
            queries = tiles.queries(saved.q, block.queries) * scores.scale
            dout = tiles.queries(saved.dout, block.queries)
            lse, delta = (tiles.per_query(x, block.queries) for x in (saved.lse, saved.delta))
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
            dq_block = torch.zeros_like(queries)
            for keys in block.keys:
                s, slope = tiles.scores(queries, k, block.queries, keys)
                p = s.sub_(lse).exp_()
                dv[:, :, keys] += tiles.transposed_matmul(p, dout)
                ds = p * (tiles.matmul(dout, v[:, :, keys].mT) - delta)
                if slope is not None:
                    ds *= slope
                dk[:, :, keys] += tiles.transposed_matmul(ds, queries)
                dq_block += tiles.matmul(ds, k[:, :, keys])
            _add_query_gradient(dq, hop, block.queries, tiles.tokens_first(dq_block * scores.scale))
        dkv.dk.copy_(dk.transpose(1, 2))
        dkv.dv.copy_(dv.transpose(1, 2))
        keys_done()

    def _blocks(self, rows: Intervals) -> Iterator[_Block]:
        """Blocks of queries, each with the slices of keys that any of them sees."""
        T = rows.row_lo.numel()
        starts = list(range(0, T, self.block_q))
        stops = [min(start + self.block_q, T) for start in starts]
        los = rows.row_lo[starts].tolist()
        his = rows.row_hi[[stop - 1 for stop in stops]].tolist()
        for start, stop, lo, hi in zip(starts, stops, los, his, strict=True):
            keys = [slice(n, min(n + self.block_k, hi)) for n in range(lo, hi, self.block_k)]
            yield _Block(slice(start, stop), keys)


@dataclass(frozen=True)
class _Block:
    queries: slice
    keys: list[slice]


@dataclass(frozen=True)
class _Tiles:
    """Views and products of tiles in which query heads are grouped by the key head they read."""

    rows: Intervals
    from_scores: Scores
    heads: int
    kv_heads: int
    dtype: torch.dtype

    def keys_first(self, x: Tensor) -> Tensor:
        """``[B, K, G, D] -> [B, G, K, D]``."""
        return x.transpose(1, 2).to(self.dtype)

    def queries(self, x: Tensor, block: slice) -> Tensor:
        """``[B, T, H, D] -> [B, G, R, t, D]``."""
        return x[:, block].transpose(1, 2).to(self.dtype).unflatten(1, (self.kv_heads, -1))

    def per_query(self, x: Tensor, block: slice) -> Tensor:
        """``[B, H, T] -> [B, G, R, t, 1]``."""
        return x[:, :, block].unflatten(1, (self.kv_heads, -1))[..., None]

    def tokens_first(self, x: Tensor) -> Tensor:
        """``[B, G, R, t, D] -> [B, t, H, D]``."""
        return x.flatten(1, 2).transpose(1, 2)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``[B, G, R, t, x] @ [B, G, x, y]``: the heads of a group share one product, nothing is repeated."""
        return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])

    def transposed_matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``[B, G, R, t, n]^T @ [B, G, R, t, D] -> [B, G, n, D]``, summed over the group's heads."""
        return a.flatten(2, 3).mT @ b.flatten(2, 3)

    def scores(self, queries: Tensor, k: Tensor, block: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """Scores ``[B, G, R, t, n]``, -inf where masked, and the softcap's derivative (None without softcap)."""
        s = self.matmul(queries, k[:, :, keys].mT)
        slope = None
        if self.from_scores.softcap:
            bounded = torch.tanh(s / self.from_scores.softcap)
            s, slope = bounded * self.from_scores.softcap, 1 - bounded.square()
        if self.from_scores.alibi_slopes is not None:
            q_pos, k_pos = self.rows.q_positions[block], self.rows.k_positions[keys]
            distance = (q_pos[:, None] - k_pos[None, :]).abs().to(self.dtype)
            slopes = self.from_scores.alibi_slopes.to(self.dtype).view(self.kv_heads, -1, 1, 1)
            s = s - slopes * distance
        key = torch.arange(keys.start, keys.stop, device=s.device)
        lo, hi = self.rows.row_lo[block, None], self.rows.row_hi[block, None]
        return s.masked_fill_((key < lo) | (key >= hi), -torch.inf), slope


def _start(tiles: _Tiles, block: _Block, hop: Hop, scores: Scores, into: Partial) -> Softmax:
    """The softmax, ``[B, G, R, t]``, that this hop's tiles are merged into."""
    if not hop.first:
        assert into.running is not None
        rows = (into.running.maximum, into.running.total)
        maximum, total = (tiles.per_query(x, block.queries)[..., 0] for x in rows)
        return Softmax(maximum, total, tiles.queries(into.running.weighted, block.queries))
    shape = into.final[:, block.queries].transpose(1, 2).unflatten(1, (tiles.kv_heads, -1)).shape
    nothing = into.lse.new_zeros(shape)
    if scores.sinks is None:
        return Softmax(nothing.new_full(shape[:-1], -torch.inf), nothing[..., 0], nothing)
    sinks = scores.sinks.to(tiles.dtype).view(tiles.kv_heads, -1, 1).expand(shape[:-1])
    return Softmax(sinks, torch.ones_like(sinks), nothing)


def _store(tiles: _Tiles, block: _Block, hop: Hop, softmax: Softmax, into: Partial) -> None:
    if hop.last:
        out, lse = softmax.finish()
        into.final[:, block.queries] = tiles.tokens_first(out)
        into.lse[:, :, block.queries] = lse.flatten(1, 2)
    else:
        assert into.running is not None
        into.running.weighted[:, block.queries] = tiles.tokens_first(softmax.weighted)
        into.running.maximum[:, :, block.queries] = softmax.maximum.flatten(1, 2)
        into.running.total[:, :, block.queries] = softmax.total.flatten(1, 2)


def _add_query_gradient(dq: QueryGradient, hop: Hop, block: slice, part: Tensor) -> None:
    if not hop.first:
        assert dq.sum is not None
        part = part + dq.sum[:, block]
    target = dq.final if hop.last else dq.sum
    assert target is not None
    target[:, block] = part
