"""The plain-torch kernel: any device, any floating dtype, tile by tile, never the whole score matrix.

It is the reference that the fast kernels are tested against, and the default on CPUs. It computes in the accumulator's
dtype (float32; float64 for float64 inputs), and rounds to the inputs' dtype once, at the end.

[Note: shapes] B batch, T local queries, K local keys, G key/value heads, R query heads per key head, t and n the
queries and keys of a tile, D head dim of q and k, V head dim of v. Inside a tile, heads come before tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.intervals import Intervals
from distflash.kernels.base import Abilities, BackwardContext, Kernel, KeyGradient, Keys, Problem, QueryGradient, Scores
from distflash.liveness import BEGUN_BITS, ENDS, GROUP_ROWS, LIVE, STARTS, all_rows
from distflash.partial import Partial, Softmax, accumulator_dtype
from distflash.plan import Pass


@dataclass(frozen=True)
class Reference(Kernel):
    """Plain torch. ``block_q`` and ``block_k`` bound the memory of a tile: ``B * H * block_q * block_k`` numbers.

    Raises:
        ValueError: a block size is no int of at least 1.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, kernel=df.kernels.Reference())
        >>> df.attention(*torch.randn(3, 1, 10, 4, 64), cp=cp).shape
        torch.Size([1, 10, 4, 64])
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
        return reasons

    def abilities(self, device: torch.device) -> Abilities:
        return Abilities(two_sources=True, some_heads=True)

    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        G = keys[0].k.shape[2]
        heads, group = each.heads or range(G), q.shape[2] // G
        begun, others = (
            range(heads.start, max(heads.start, each.begun)),
            range(max(heads.start, each.begun), heads.stop),
        )
        for some, sources, bits in ((begun, keys[1:], BEGUN_BITS), (others, keys, 0)):
            if some:
                of_keys, of_queries = _slices(some, group)
                self._attend(
                    q[:, :, of_queries],
                    tuple(Keys(x.k[:, :, of_keys], x.v[:, :, of_keys], x.rows) for x in sources),
                    _groups(each, q.shape[1], bits),
                    scores.of_heads(of_queries),
                    into.of_heads(of_queries),
                )

    def _attend(
        self, q: Tensor, keys: tuple[Keys, ...], groups: list[tuple[range, int]], scores: Scores, into: Partial
    ) -> None:
        sources = [_Source.of(x, scores, q) for x in keys]
        for block, flags in self._blocks(groups):
            seen = [(source, tile) for source in sources for tile in self._tiles(source, block)]
            if not (seen or flags & (STARTS | ENDS)):
                continue  # no key to add, and the running state stays as it is
            softmax = _start(sources[0].tiles, block, bool(flags & STARTS), scores, into)
            queries = sources[0].tiles.queries(q, block) * scores.scale
            for source, tile in seen:
                s, _ = source.tiles.scores(queries, source.k, block, tile)
                dropped = source.tiles.dropped(len(q), block, tile)
                softmax = softmax.merge(Softmax.of_scores(s, source.v[:, :, None, tile], dropped))
            _store(sources[0].tiles, block, bool(flags & ENDS), softmax, scores, into)

    def preprocess(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> BackwardContext:
        dtype = accumulator_dtype(out.dtype)
        delta = (out.to(dtype) * dout.to(dtype)).sum(-1).transpose(1, 2)
        sums = q.new_empty(q.shape, dtype=dtype)
        return BackwardContext(q, dout, lse, delta if dlse is None else delta - dlse, dq_accum=sums)

    def backward(
        self, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        assert saved.dq_accum is not None
        if each.first:
            saved.dq_accum.zero_()
        G = keys.k.shape[2]
        of_keys, of_queries = _slices(each.heads or range(G), saved.q.shape[2] // G)
        part = BackwardContext(
            saved.q[:, :, of_queries],
            saved.dout[:, :, of_queries],
            saved.lse[:, of_queries],
            saved.delta[:, of_queries],
            dq_accum=saved.dq_accum[:, :, of_queries],
        )
        some = Keys(keys.k[:, :, of_keys], keys.v[:, :, of_keys], keys.rows)
        self._differentiate(
            part, some, scores.of_heads(of_queries), KeyGradient(dkv.dk[:, :, of_keys], dkv.dv[:, :, of_keys])
        )
        if each.last:
            dq.final.copy_(saved.dq_accum)

    def _differentiate(self, saved: BackwardContext, keys: Keys, scores: Scores, dkv: KeyGradient) -> None:
        source = _Source.of(keys, scores, saved.q)
        tiles, k, v = source.tiles, source.k, source.v
        assert saved.dq_accum is not None
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, saved.q.shape[1], self.block_q):
            block = slice(start, min(start + self.block_q, saved.q.shape[1]))
            queries = tiles.queries(saved.q, block) * scores.scale
            dout = tiles.queries(saved.dout, block)
            lse, delta = (tiles.per_query(x, block) for x in (saved.lse, saved.delta))
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
            dq_block = torch.zeros_like(queries)
            for tile in self._tiles(source, block):
                s, slope = tiles.scores(queries, k, block, tile)
                p = s.sub_(lse).exp_()
                dp = tiles.matmul(dout, v[:, :, tile].mT)
                dropped = tiles.dropped(len(saved.q), block, tile)
                if dropped is not None:
                    dp *= dropped
                dv[:, :, tile] += tiles.transposed_matmul(p if dropped is None else p * dropped, dout)
                ds = p * (dp - delta)
                if slope is not None:
                    ds *= slope
                dk[:, :, tile] += tiles.transposed_matmul(ds, queries)
                dq_block += tiles.matmul(ds, k[:, :, tile])
            saved.dq_accum[:, block] += tiles.tokens_first(dq_block * scores.scale)
        dkv.dk.copy_(dk.transpose(1, 2))
        dkv.dv.copy_(dv.transpose(1, 2))

    def _blocks(self, groups: list[tuple[range, int]]) -> list[tuple[slice, int]]:
        """The row groups divided into blocks, with the flags of each."""
        return [
            (slice(start, min(start + self.block_q, rows.stop)), flags)
            for rows, flags in groups
            for start in rows[:: self.block_q]
        ]

    def _tiles(self, source: _Source, block: slice) -> list[slice]:
        """The tiles of keys that contain keys that any query of the block sees."""
        lo, hi = int(source.lo[block.start]), int(source.hi[block.stop - 1])
        return [slice(n, min(n + self.block_k, hi)) for n in range(lo, hi, self.block_k)]


def _groups(each: Pass, length: int, bits: int) -> list[tuple[range, int]]:
    """The row groups that a pass works on, of ``length`` rows, with their flags, which start at bit ``bits``."""
    if each.live is None:
        return [(range(length), all_rows(each.first, each.last, each.begun > 0) >> bits)]
    groups = ((start, flags >> bits) for start, flags in each.live.groups.tolist())
    return [(range(start, min(start + GROUP_ROWS, length)), flags) for start, flags in groups if flags & LIVE]


def _slices(kv_heads: range, group: int) -> tuple[slice, slice]:
    """Key heads, and the query heads that read them."""
    return slice(kv_heads.start, kv_heads.stop), slice(kv_heads.start * group, kv_heads.stop * group)


@dataclass(frozen=True)
class _Source:
    """The keys of one source, with heads before tokens, in the accumulator's dtype, and the row bounds on the host."""

    tiles: _Tiles
    k: Tensor
    v: Tensor
    lo: Tensor
    hi: Tensor

    @staticmethod
    def of(keys: Keys, scores: Scores, q: Tensor) -> _Source:
        tiles = _Tiles(keys.rows, scores, q.shape[2], keys.k.shape[2], accumulator_dtype(q.dtype))
        k, v = tiles.keys_first(keys.k), tiles.keys_first(keys.v)
        return _Source(tiles, k, v, keys.rows.row_lo.cpu(), keys.rows.row_hi.cpu())


@dataclass(frozen=True)
class _Tiles:
    """Views and products of tiles in which query heads are grouped by their key head."""

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
        """``[B, G, R, t, x] @ [B, G, x, y]``: one product for each group of heads, without repeating keys."""
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

    def dropped(self, batch: int, block: slice, keys: slice) -> Tensor | None:
        """What dropout multiplies probabilities by, ``[B, G, R, t, n]``: the keep scale, or 0. None without dropout."""
        dropout = self.from_scores.dropout
        if dropout is None:
            return None
        kept = dropout.kept(batch, range(self.heads), self.rows.q_positions[block], self.rows.k_positions[keys])
        return kept.unflatten(1, (self.kv_heads, -1)).to(self.dtype).mul_(dropout.keep_scale)


def _start(tiles: _Tiles, block: slice, first: bool, scores: Scores, into: Partial) -> Softmax:
    """The softmax state, ``[B, G, R, t]``, that the pass's tiles are merged into."""
    if not first:
        assert into.running is not None
        rows = (into.running.maximum, into.running.total)
        maximum, total = (tiles.per_query(x, block)[..., 0] for x in rows)
        # Copies, since a block that sees none of the keys is stored unchanged, and must not be a view of its
        # destination.
        return Softmax(maximum.clone(), total.clone(), tiles.queries(into.running.weighted, block).clone())
    shape = into.final[:, block].transpose(1, 2).unflatten(1, (tiles.kv_heads, -1)).shape
    nothing = into.lse.new_zeros(shape)
    if scores.sinks is None or into.maxima is not None:
        return Softmax(nothing.new_full(shape[:-1], -torch.inf), nothing[..., 0], nothing)
    sinks = scores.sinks.to(tiles.dtype).view(tiles.kv_heads, -1, 1).expand(shape[:-1])
    return Softmax(sinks, torch.ones_like(sinks), nothing)


def _store(tiles: _Tiles, block: slice, last: bool, softmax: Softmax, scores: Scores, into: Partial) -> None:
    if last:
        if into.maxima is not None:
            into.maxima[:, :, block] = softmax.maximum.flatten(1, 2)
            softmax = softmax if scores.sinks is None else softmax.with_sinks(scores.sinks.view(tiles.kv_heads, -1, 1))
        out, lse = softmax.finish()
        into.final[:, block] = tiles.tokens_first(out)
        into.lse[:, :, block] = lse.flatten(1, 2)
    else:
        assert into.running is not None
        into.running.weighted[:, block] = tiles.tokens_first(softmax.weighted)
        into.running.maximum[:, :, block] = softmax.maximum.flatten(1, 2)
        into.running.total[:, :, block] = softmax.total.flatten(1, 2)
