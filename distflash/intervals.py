"""Row and column intervals: all that a kernel is told about masks, layouts and ranks.

Attention between any rank's queries and any owner's keys is two int32 per query row, ``lo <= key < hi`` in the
owner's local key indices. Both ends ascend, so

- a block of rows is described by the ends of its first and last row: keys outside ``[lo[first], hi[last])`` are
  skipped, keys inside ``[lo[last], hi[first])`` need no masking, and only the borders compare row ends;
- the transpose is an interval too: the queries that see key ``j`` are ``col_lo[j] <= query < col_hi[j]``.

[Note: shapes] T local queries of this rank, K local keys of the owner.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from distflash.layouts import Layout
from distflash.masks import Ends, Mask, wrapped

# A union of more intervals than this is refused: each is a pass over all queries.
MOST_PARTS = 16


@dataclass(frozen=True)
class Sharding:
    """A sequence of ``seq_len`` tokens under a mask, spread over ``world_size`` ranks by a layout."""

    mask: Mask
    layout: Layout
    seq_len: int
    world_size: int

    def positions(self, rank: int) -> Tensor:
        return self.layout.positions(self.seq_len, self.world_size, rank)

    def length(self, rank: int) -> int:
        return self.layout.length(self.seq_len, self.world_size, rank)

    def parts(self, rank: int) -> tuple[Ends, ...]:
        """The global ends ``(lo, hi)``, int64 ``[T]``, of each part of the mask, for the queries that ``rank`` holds.

        Raises:
            ValueError: the mask's ends are not what `Mask.ends` promises, or it has too many parts.
        """
        positions = self.positions(rank)
        parts = self.mask.parts(positions, self.seq_len)
        if len(parts) > MOST_PARTS:
            raise ValueError(
                f"mask: {self.mask!r} gives the queries of rank {rank} {len(parts)} intervals of keys that cannot be "
                f"joined; expected at most {MOST_PARTS}, since each is a pass of the kernel over the queries. Use a "
                "mask of fewer parts, or one that allows more pairs"
            )
        for lo, hi in parts:
            _require_ends(self.mask, positions, lo, hi)
        return tuple((lo.clamp(0, self.seq_len), hi.clamp(0, self.seq_len)) for lo, hi in parts)

    def local(self, ends: Ends, owner: int) -> Ends:
        """Global ends as ends in the owner's local key indices; an empty interval has ``hi == lo``."""
        lo, hi = (self.layout.count_below(end, self.seq_len, self.world_size, owner) for end in ends)
        return lo, torch.maximum(lo, hi)


@dataclass(frozen=True)
class Intervals:
    """Which of an owner's keys each of a rank's queries sees, for rows and, transposed, for columns.

    Attributes:
        keys: the owner's local keys that this is about. Indices of keys count from its start, and K is its length.
        row_lo, row_hi: int32 ``[T]``, non-decreasing: query ``i`` sees local keys ``row_lo[i] <= j < row_hi[i]``.
        col_lo, col_hi: int32 ``[K]``, non-decreasing: key ``j`` is seen by local queries
            ``col_lo[j] <= i < col_hi[j]``.
        q_positions, k_positions: int32 ``[T]``, ``[K]``, global positions, for what needs true distance (ALiBi).
        pairs: the exact number of allowed (query, key) pairs, known on the host.
        unseen: at most two ranges that together hold every key that no query sees, known on the host.
    """

    keys: range
    row_lo: Tensor
    row_hi: Tensor
    col_lo: Tensor
    col_hi: Tensor
    q_positions: Tensor
    k_positions: Tensor
    pairs: int
    unseen: tuple[range, ...] = ()

    def to(self, device: torch.device) -> Intervals:
        """The same intervals with every tensor on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def _require_ends(mask: Mask, positions: Tensor, lo: Tensor, hi: Tensor) -> None:
    """Refuse ends by which keys would be left out silently: a mask of the user's own may break its promises."""
    for name, end in (("lo", lo), ("hi", hi)):
        if end.shape != positions.shape or end.dtype != torch.int64:
            raise ValueError(
                f"mask: {mask!r}.ends returned {name} as {end.dtype} {list(end.shape)}; expected int64 "
                f"{list(positions.shape)}, one number per query"
            )
        falls = (end.diff() < 0).nonzero()
        if len(falls):
            n = int(falls[0])
            raise ValueError(
                f"mask: {mask!r}.ends returned {name} = {int(end[n])} for the query at {int(positions[n])} and "
                f"{int(end[n + 1])} for that at {int(positions[n + 1])}; expected numbers that never decrease"
            )
    if wrapped(lo, hi):
        raise ValueError(
            f"mask: {mask!r}.ends returned {int(lo[-1])} <= key < {int(hi[0])}, which has wrapped around at int64's "
            "limits; clamp large numbers before adding them to positions, and give an empty interval as lo = hi"
        )


def _require_cover(sharding: Sharding) -> None:
    """Refuse a layout by which tokens would be lost, or counted twice, silently."""
    layout, S, W = sharding.layout, sharding.seq_len, sharding.world_size
    held = [[r for r in layout.ranges(S, W, rank) if len(r)] for rank in range(W)]
    ascend = all(r.step > 0 for ranges in held for r in ranges) and all(
        before[-1] < after[0] for ranges in held for before, after in pairwise(ranges)
    )
    covers = sum(map(len, chain(*held))) == S and sum(map(_sum, chain(*held))) == S * (S - 1) // 2
    if not (ascend and covers):
        raise ValueError(
            f"layout: {layout!r}.ranges gives the {W} ranks {held} of seq_len={S}; expected ascending ranges that hold "
            f"each of the {S} positions once"
        )


def _sum(r: range) -> int:
    return len(r) * (r[0] + r[-1]) // 2


def build(sharding: Sharding, rank: int, owner: int) -> tuple[Intervals, ...]:
    """The intervals between ``rank``'s queries and ``owner``'s keys, on the CPU. See the module's docstring.

    Returns:
        One for each part of the mask in which a pair is allowed, but at least one. The first is about all keys of the
        owner, each other one about the keys from the first to the last that it allows.
    """
    local = [sharding.local(ends, owner) for ends in sharding.parts(rank)]
    seen = [ends for ends in local if bool((ends[1] > ends[0]).any())] or local[:1]
    # The part of most pairs comes first: the others then are about few keys.
    seen.sort(key=lambda ends: int((ends[0] - ends[1]).sum()))
    positions, whole = (sharding.positions(rank), sharding.positions(owner)), range(sharding.length(owner))
    return tuple(_intervals(positions, ends, _hull(ends) if n else whole) for n, ends in enumerate(seen))


def _hull(ends: Ends) -> range:
    """From the first key to the last that any query sees."""
    lo, hi = (end[ends[1] > ends[0]] for end in ends)
    return range(int(lo[0]), int(hi[-1]))


def _intervals(positions: tuple[Tensor, Tensor], ends: Ends, keys: range) -> Intervals:
    """Of ``ends`` in the owner's local key indices, about ``keys``. positions: of the queries, and of all keys."""
    row_lo, row_hi = ((end - keys.start).clamp(0, len(keys)) for end in ends)
    columns = torch.arange(len(keys))
    # The ends ascend, so the rows with row_lo[i] <= j are the first ones, and those with row_hi[i] > j the last ones.
    col_hi = torch.searchsorted(row_lo, columns, right=True)
    col_lo = torch.minimum(torch.searchsorted(row_hi, columns, right=True), col_hi)
    return Intervals(
        keys=keys,
        row_lo=row_lo.int(),
        row_hi=row_hi.int(),
        col_lo=col_lo.int(),
        col_hi=col_hi.int(),
        q_positions=positions[0].int(),
        k_positions=positions[1][keys.start : keys.stop].int(),
        pairs=int((row_hi - row_lo).sum()),
        unseen=_ranges_of(col_lo == col_hi),
    )


def _ranges_of(flags: Tensor) -> tuple[range, ...]:
    """Where bool ``flags [K]`` are set: the ranges, or one from the first to the last if there are more than two."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    if len(starts) > 2:
        starts, stops = starts[:1], stops[-1:]
    return tuple(range(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))


def count_pairs(sharding: Sharding) -> Tensor:
    """int64 ``[W, W]``: how many (query, key) pairs each rank (row) has with each owner's keys (column).

    Exact, and known on every rank without asking any other: from it follow which hops are made, the balance between
    ranks and the floating-point operations.

    Raises:
        ValueError: the layout or the mask, which may be the user's own, breaks its promises.
    """
    _require_cover(sharding)
    ranks = range(sharding.world_size)
    # All ranks' queries in one tensor, rank after rank: W small passes instead of W x W tiny ones.
    parts = [sharding.parts(rank) for rank in ranks]
    most = max(map(len, parts))
    stops = torch.tensor([0, *(sharding.length(rank) for rank in ranks)]).cumsum(0)
    counts = torch.empty(len(ranks), len(ranks), dtype=torch.int64)
    for owner in ranks:
        seen = sum(_seen(sharding, [_nth(own, n) for own in parts], owner) for n in range(most))
        counts[:, owner] = torch.cat([stops[:1], torch.as_tensor(seen).cumsum(0)])[stops].diff()
    return counts


def _nth(parts: tuple[Ends, ...], n: int) -> Ends:
    """The n-th part; an empty one where a rank has fewer than others."""
    nothing = torch.zeros_like(parts[0][0])
    return parts[n] if n < len(parts) else (nothing, nothing)


def _seen(sharding: Sharding, ends: list[Ends], owner: int) -> Tensor:
    """How many of the owner's keys each query of all ranks sees, by the ends of each rank's queries."""
    lo, hi = sharding.local((torch.cat([lo for lo, _ in ends]), torch.cat([hi for _, hi in ends])), owner)
    return hi - lo
