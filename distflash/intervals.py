"""Row and column intervals: all that a kernel is told about masks, layouts and ranks.

Attention between any rank's queries and any source's keys is two int32 per query row, ``lo <= key < hi`` in the
source's local key indices. Both ends ascend, so

- a block of rows is described by the ends of its first and last row: keys outside ``[lo[first], hi[last])`` are
  skipped, keys inside ``[lo[last], hi[first])`` need no masking, and only the borders compare row ends;
- the transpose is an interval too: the queries that see key ``j`` are ``col_lo[j] <= query < col_hi[j]``.

[Note: shapes] T local queries of this rank, K local keys of the source.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from distflash.geometry import Geometry
from distflash.masks import Ends
from distflash.upload import upload

_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Intervals:
    """Which of a source's keys each of a rank's queries sees, for rows and, transposed, for columns.

    Attributes:
        keys: of the keys at hand, those that this is about. Indices of keys count from its start, and K is its length.
        row_lo, row_hi: int32 ``[T]``, non-decreasing: query ``i`` sees local keys ``row_lo[i] <= j < row_hi[i]``.
        col_lo, col_hi: int32 ``[K]``, non-decreasing: key ``j`` is seen by local queries
            ``col_lo[j] <= i < col_hi[j]``. Empty where no backward follows.
        q_positions, k_positions: int32 ``[T]``, ``[K]``, global positions, for what needs true distance (ALiBi); the
            keys' may be empty where nothing does.
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
        moved: dict[str, Any] = {name: upload(x, device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def build(geometry: Geometry, rank: int, source: int, rows: tuple[range, ...] | None = None) -> tuple[Intervals, ...]:
    """The intervals between ``rank``'s queries and ``source``'s keys, on the CPU. See the module's docstring.

    Args:
        geometry: queries and keys of the call.
        rank, source: whose queries, and whose keys.
        rows: the source's local keys that are at hand, one after the other, as ascending ranges; None for all. Every
            key that a query of the rank sees is among them. Indices of keys count among these.

    Returns:
        One for each part of the mask in which a pair is allowed, but at least one. The first is about all keys at hand,
        each other one about the keys from the first to the last that it allows.
    """
    local = [geometry.local(ends, source) for ends in geometry.parts(rank)]
    length = geometry.keys.length(source) if rows is None else sum(map(len, rows))
    k_positions = geometry.keys.positions(source) if geometry.distances else _NOTHING
    if rows is not None:
        local = [_among(ends, rows) for ends in local]
        if geometry.distances:
            k_positions = torch.cat([k_positions[r.start : r.stop] for r in rows])
    seen = [ends for ends in local if bool((ends[1] > ends[0]).any())] or local[:1]
    # The part of most pairs comes first: the others then are about few keys.
    seen.sort(key=lambda ends: int((ends[0] - ends[1]).sum()))
    positions, whole = (geometry.queries.positions(rank), k_positions), range(length)
    return tuple(
        _intervals(positions, ends, _hull(ends) if n else whole, geometry.for_backward) for n, ends in enumerate(seen)
    )


def _among(ends: Ends, rows: tuple[range, ...]) -> Ends:
    """Ends in a source's local key indices as ends among ``rows`` of them."""
    starts = torch.tensor([r.start for r in rows])
    lengths = torch.tensor([len(r) for r in rows])
    before = lengths.cumsum(0) - lengths

    def among(end: Tensor) -> Tensor:
        run = (torch.searchsorted(starts, end, right=True) - 1).clamp_min(0)
        return before[run] + (end - starts[run]).clamp_min(0).minimum(lengths[run])

    lo, hi = map(among, ends)
    return lo, torch.maximum(lo, hi)


def _hull(ends: Ends) -> range:
    """From the first key to the last that any query sees."""
    lo, hi = (end[ends[1] > ends[0]] for end in ends)
    return range(int(lo[0]), int(hi[-1]))


def _intervals(positions: tuple[Tensor, Tensor], ends: Ends, keys: range, for_backward: bool) -> Intervals:
    """Of ``ends`` among the keys at hand, about ``keys``. positions: of the queries, and of the keys at hand."""
    row_lo, row_hi = ((end - keys.start).clamp(0, len(keys)) for end in ends)
    col_lo, col_hi = _columns(row_lo, row_hi, len(keys)) if for_backward else (_NOTHING, _NOTHING)
    return Intervals(
        keys=keys,
        row_lo=row_lo.int(),
        row_hi=row_hi.int(),
        col_lo=col_lo.int(),
        col_hi=col_hi.int(),
        q_positions=positions[0].int(),
        k_positions=positions[1][keys.start : keys.stop].int(),
        pairs=int((row_hi - row_lo).sum()),
        unseen=_ranges_of(col_lo == col_hi) if for_backward else (),
    )


def _columns(row_lo: Tensor, row_hi: Tensor, keys: int) -> Ends:
    """The transpose: which queries see each key."""
    columns = torch.arange(keys)
    # The ends ascend, so the rows with row_lo[i] <= j are the first ones, and those with row_hi[i] > j the last ones.
    col_hi = torch.searchsorted(row_lo, columns, right=True)
    return torch.minimum(torch.searchsorted(row_hi, columns, right=True), col_hi), col_hi


def _ranges_of(flags: Tensor) -> tuple[range, ...]:
    """Where bool ``flags [K]`` are set: the ranges, or one from the first to the last if there are more than two."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    if len(starts) > 2:
        starts, stops = starts[:1], stops[-1:]
    return tuple(range(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))
