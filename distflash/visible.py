"""The keys that queries see, from the bounds of their intervals: as ranges, and counted by the ranks that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

import torch
from torch import Tensor

from distflash.mask_algebra import Ends


@dataclass(frozen=True)
class Runs:
    """The keys of all sources in runs of consecutive positions. There are few, unless a layout deals single tokens.

    Attributes:
        points: ascending, where runs start or stop.
        sources: for each two consecutive points, the rank that holds the keys between them; ``world_size`` if none.
        world_size: the number of ranks.
    """

    points: Tensor
    sources: Tensor
    world_size: int

    @staticmethod
    def of(positions: Sequence[Tensor]) -> Runs:
        """``positions``: by source, integers, ascending."""
        firsts, ends = [], []
        for of_source in positions:
            gaps = (of_source.diff() != 1).nonzero().flatten()
            firsts.append(torch.cat([of_source[:1], of_source[gaps + 1]]))
            ends.append(torch.cat([of_source[gaps], of_source[-1:]]) + 1)
        points = torch.cat([*firsts, *ends]).unique()
        sources = torch.full((max(0, len(points) - 1),), len(positions))
        for source, first in enumerate(firsts):
            sources[torch.searchsorted(points, first)] = source
        return Runs(points, sources, len(positions))

    def pairs(self, parts: Sequence[Ends]) -> Tensor:
        """How many pairs the queries with these bounds have with the keys of each source: int64 ``[W]``.

        The keys before a point x that are in ``[lo, hi)`` are ``min(hi, x) - min(lo, x)``. Summed over queries at the
        ends of runs only: looking at every query for every source takes seconds for a million tokens on 64 ranks.
        """
        found = torch.zeros(self.world_size + 1, dtype=torch.int64)
        for lo, hi in parts:
            before = _sums_up_to(torch.maximum(lo, hi), self.points) - _sums_up_to(lo, self.points)
            found.index_add_(0, self.sources, before.diff())
        return found[:-1]


def _sums_up_to(ends: Tensor, points: Tensor) -> Tensor:
    """For each point, the sum of ``min(end, point)`` over all ends. Both ascend."""
    if len(points) <= len(ends):
        lower = torch.searchsorted(ends, points)
    else:  # the same numbers of ends below each point, counted by ends
        at = torch.searchsorted(points, ends, right=True)
        lower = torch.bincount(at, minlength=len(points) + 1)[:-1].cumsum(0)
    sums = torch.cat([ends.new_zeros(1), ends.cumsum(0)])
    return sums[lower] + (len(ends) - lower) * points


def seen(parts: Sequence[Ends]) -> list[range]:
    """The global positions that queries with these bounds see, as ascending ranges that do not touch."""
    found: list[range] = []
    for lo, hi in parts:
        found += map(range, *joined(lo, hi, torch.zeros_like(lo))[:2])
    return _union(found)


def joined(lo: Tensor, hi: Tensor, whose: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Intervals without the empty ones, joined where neighbours touch or overlap and are ``whose`` alike.

    Bounds do not decrease among intervals of the same one.
    """
    some = hi > lo
    lo, hi, whose = lo[some], hi[some], whose[some]
    gaps = ((lo[1:] > hi[:-1]) | (whose[1:] != whose[:-1])).nonzero().flatten()
    starts, readers = (torch.cat([each[:1], each[gaps + 1]]).tolist() for each in (lo, whose))
    return starts, torch.cat([hi[gaps], hi[-1:]]).tolist(), readers


def _union(runs: list[range]) -> list[range]:
    """The union as ascending ranges that do not touch."""
    runs = sorted(runs, key=attrgetter("start"))
    merged = runs[:1]
    for run in runs[1:]:
        if run.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, run.stop))
        else:
            merged.append(run)
    return merged


def without_gaps(runs: list[range]) -> tuple[range, ...]:
    """Fill in the smallest gaps, together at most 2% of the keys: fewer ranges mean fewer copies."""
    spare = sum(map(len, runs)) // 50
    gaps = sorted((b.start - a.stop, n) for n, (a, b) in enumerate(pairwise(runs)))
    filled = set()
    for gap, n in gaps:
        spare -= gap
        if spare < 0:
            break
        filled.add(n)
    kept: list[range] = []
    for n, run in enumerate(runs):
        if n - 1 in filled:
            kept[-1] = range(kept[-1].start, run.stop)
        else:
            kept.append(run)
    return tuple(kept)
