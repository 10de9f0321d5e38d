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

import torch
from torch import Tensor

from distflash.layouts import Layout
from distflash.masks import Mask


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

    def ends(self, rank: int) -> tuple[Tensor, Tensor]:
        """The global ends ``(lo, hi)``, int64 ``[T]``, of the queries that ``rank`` holds."""
        lo, hi = self.mask.ends(self.positions(rank), self.seq_len)
        return lo.clamp(0, self.seq_len), hi.clamp(0, self.seq_len)

    def local(self, ends: tuple[Tensor, Tensor], owner: int) -> tuple[Tensor, Tensor]:
        """Global ends as ends in the owner's local key indices; an empty interval has ``hi == lo``."""
        lo, hi = (self.layout.count_below(end, self.seq_len, self.world_size, owner) for end in ends)
        return lo, torch.maximum(lo, hi)


@dataclass(frozen=True)
class Intervals:
    """Which of an owner's keys each of a rank's queries sees, for rows and, transposed, for columns.

    Attributes:
        row_lo, row_hi: int32 ``[T]``, non-decreasing: query ``i`` sees local keys ``row_lo[i] <= j < row_hi[i]``.
        col_lo, col_hi: int32 ``[K]``, non-decreasing: key ``j`` is seen by local queries
            ``col_lo[j] <= i < col_hi[j]``.
        q_positions, k_positions: int32 ``[T]``, ``[K]``, global positions, for what needs true distance (ALiBi).
        pairs: the exact number of allowed (query, key) pairs, known on the host.
        unseen: at most two ranges that together hold every key that no query sees, known on the host.
    """

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
        return replace(self, **{name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)})


def build(sharding: Sharding, rank: int, owner: int) -> Intervals:
    """The intervals between ``rank``'s queries and ``owner``'s keys, on the CPU. See the module's docstring."""
    row_lo, row_hi = sharding.local(sharding.ends(rank), owner)
    keys = torch.arange(sharding.length(owner))
    # The ends ascend, so the rows with row_lo[i] <= j are the first ones, and those with row_hi[i] > j the last ones.
    col_hi = torch.searchsorted(row_lo, keys, right=True)
    col_lo = torch.minimum(torch.searchsorted(row_hi, keys, right=True), col_hi)
    return Intervals(
        row_lo=row_lo.int(),
        row_hi=row_hi.int(),
        col_lo=col_lo.int(),
        col_hi=col_hi.int(),
        q_positions=sharding.positions(rank).int(),
        k_positions=sharding.positions(owner).int(),
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
    """
    ranks = range(sharding.world_size)
    # All ranks' queries in one tensor, rank after rank: W small passes instead of W x W tiny ones.
    lo, hi = (torch.cat(ends) for ends in zip(*map(sharding.ends, ranks), strict=True))
    stops = torch.tensor([0, *(sharding.length(rank) for rank in ranks)]).cumsum(0)
    counts = torch.empty(len(ranks), len(ranks), dtype=torch.int64)
    for owner in ranks:
        local_lo, local_hi = sharding.local((lo, hi), owner)
        before = torch.cat([stops[:1], (local_hi - local_lo).cumsum(0)])
        counts[:, owner] = before[stops].diff()
    return counts
