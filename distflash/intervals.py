"""Row and column intervals: the form in which a kernel gets the mask, for any layout and rank.

For the queries of a rank and the keys of a source, each query has two int32 bounds, ``lo <= key < hi``, in the source's
local key indices. Both are non-decreasing, so

- a block of rows needs only the bounds of its first and last row: keys outside ``[lo[first], hi[last])`` are skipped,
  keys inside ``[lo[last], hi[first])`` need no mask, and only the blocks in between compare keys with row bounds;
- the transpose is an interval as well: key ``j`` is seen by the queries ``col_lo[j] <= query < col_hi[j]``.

[Note: shapes] T local queries of this rank, K local keys of the source.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from distflash.geometry import Geometry
from distflash.host_to_device import to_device
from distflash.mask_algebra import Ends

POSITION_TILE = 128
_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Intervals:
    """The mask between a rank's queries and a source's keys: an interval for each row and for each column.

    Attributes:
        keys: the rows of the source's K and V on this rank that the intervals cover; ``j = 0`` is the first of them. K
            is its length.
        row_lo, row_hi: int32 ``[T]``, non-decreasing: query ``i`` sees local keys ``row_lo[i] <= j < row_hi[i]``.
        col_lo, col_hi: int32 ``[K]``, non-decreasing: key ``j`` is seen by local queries
            ``col_lo[j] <= i < col_hi[j]``. Empty if no backward follows.
        q_positions, k_positions: int32 ``[T]``, ``[K]``, global positions, for scores that depend on the distance
            (ALiBi); otherwise the keys' may be empty.
        pairs: the exact number of allowed (query, key) pairs, on the host.
        unseen: at most two ranges, on the host, that contain every key that no query sees.
        in_tiles: whether each tile of POSITION_TILE queries, and of keys, has consecutive positions that start at a
            multiple of 16. Then dropout kernels load only the first position of a tile. False if no backward follows.
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
    in_tiles: bool = False

    def to(self, device: torch.device) -> Intervals:
        """The same intervals with every tensor on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: to_device(x, device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def build(geometry: Geometry, rank: int, source: int, rows: tuple[range, ...] | None = None) -> tuple[Intervals, ...]:
    """The intervals between ``rank``'s queries and ``source``'s keys, on the CPU. See the module's docstring.

    Args:
        geometry: queries and keys of the call.
        rank, source: whose queries, and whose keys.
        rows: the source's local keys that this rank has received, as ascending ranges; None for all. They contain
            every key that a query sees, and are concatenated: key indices count within the concatenation.

    Returns:
        One for each part of the mask that has an allowed pair, at least one. The first covers all keys received; the
        others cover the keys from the first to the last that they allow.
    """
    local = [geometry.local(ends, source) for ends in geometry.parts(rank)]
    length = geometry.keys.length(source) if rows is None else sum(map(len, rows))
    k_positions = geometry.keys.positions(source) if geometry.distances else _NOTHING
    if rows is not None:
        local = [_among(ends, rows) for ends in local]
        if geometry.distances:
            k_positions = torch.cat([k_positions[r.start : r.stop] for r in rows])
    seen = [ends for ends in local if bool((ends[1] > ends[0]).any())] or local[:1]
    # The part with the most pairs comes first, because only the first has to cover all keys.
    seen.sort(key=lambda ends: int((ends[0] - ends[1]).sum()))
    positions, whole = (geometry.queries.positions(rank), k_positions), range(length)
    return tuple(
        _intervals(positions, ends, _hull(ends) if n else whole, geometry.for_backward) for n, ends in enumerate(seen)
    )


def _among(ends: Ends, rows: tuple[range, ...]) -> Ends:
    """Bounds in a source's local key indices, converted to indices into ``rows``."""
    starts = torch.tensor([r.start for r in rows])
    lengths = torch.tensor([len(r) for r in rows])
    before = lengths.cumsum(0) - lengths

    def among(end: Tensor) -> Tensor:
        run = (torch.searchsorted(starts, end, right=True) - 1).clamp_min(0)
        return before[run] + (end - starts[run]).clamp_min(0).minimum(lengths[run])

    lo, hi = map(among, ends)
    return lo, torch.maximum(lo, hi)


def _hull(ends: Ends) -> range:
    """The range from the first to the last key that any query sees."""
    lo, hi = (end[ends[1] > ends[0]] for end in ends)
    return range(int(lo[0]), int(hi[-1]))


def _intervals(positions: tuple[Tensor, Tensor], ends: Ends, keys: range, for_backward: bool) -> Intervals:
    """The intervals of ``keys``, from row bounds in received keys. positions: of queries, and of received keys."""
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
        in_tiles=for_backward and all(_in_tiles(x) for x in (positions[0], positions[1][keys.start : keys.stop])),
    )


def _in_tiles(positions: Tensor) -> bool:
    """See `Intervals.in_tiles`."""
    firsts = positions[::POSITION_TILE]
    expected = firsts.repeat_interleave(POSITION_TILE)[: len(positions)]
    inside = torch.arange(len(positions)) % POSITION_TILE
    return bool((firsts % 16 == 0).all() and (positions == expected + inside).all())


def _columns(row_lo: Tensor, row_hi: Tensor, keys: int) -> Ends:
    """The transpose: which queries see each key."""
    columns = torch.arange(keys)
    # Bounds do not decrease, so rows with row_lo[i] <= j are a prefix, and rows with row_hi[i] > j a suffix.
    col_hi = torch.searchsorted(row_lo, columns, right=True)
    return torch.minimum(torch.searchsorted(row_hi, columns, right=True), col_hi), col_hi


def _ranges_of(flags: Tensor) -> tuple[range, ...]:
    """At most two ranges that contain the set ``flags [K]``, bool. More than two are joined to one."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    if len(starts) > 2:
        starts, stops = starts[:1], stops[-1:]
    return tuple(range(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))
