"""The work of a mask along a sequence: how many keys its queries see, from samples.

[Note: pairs] The number of allowed pairs of the queries before a position is exact at the edges of segments. Within a
segment, the number of visible keys is assumed to change linearly, as it does between a mask's `jumps`. For other masks
the counts are estimates, which only affect how well ranks are balanced.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from distflash.mask_algebra import Mask

# Beyond any position.
_FAR = 2**62


@dataclass(frozen=True, eq=False)
class Workload:
    """The queries of a sequence, by segments.

    Attributes:
        edges: the bounds of segments: ascending positions from 0 to S.
        below: the allowed pairs of the queries before each edge.
        keys: by segments, the number of keys that the first query sees.
        slopes: by segments, how many more keys each further query sees.
        first, last: int64 by segments, the first key that its queries see and the one after the last.
        cuts: the edges that no query sees across, including 0 and S.
    """

    edges: list[int]
    below: list[int]
    keys: list[int]
    slopes: list[float]
    first: Tensor
    last: Tensor
    cuts: list[int]

    @staticmethod
    def of(masks: Sequence[Mask], seq_len: int, chunk: int) -> Workload:
        """The work of one mask, or the sum of several masks over the same positions.

        Samples the queries at both ends of each segment: O(documents + seq_len / chunk).
        """
        jumps = [mask.jumps(seq_len).clamp(0, seq_len) for mask in masks]
        edges = torch.cat([*jumps, torch.arange(0, seq_len, chunk), torch.tensor([0, seq_len])]).unique()
        at = torch.stack([edges[:-1], edges[1:] - 1], 1).flatten()
        keys, first, last = _seen(masks, at, seq_len)
        sizes = edges.diff()
        below = torch.nn.functional.pad((sizes * keys.sum(1)).div(2, rounding_mode="floor").cumsum(0), (1, 0))
        slopes = keys.diff(dim=1)[:, 0].double() / (sizes - 1).clamp_min(1)
        return Workload(
            edges=edges.tolist(),
            below=below.tolist(),
            keys=keys[:, 0].tolist(),
            slopes=slopes.tolist(),
            first=first[:, 0],
            last=last[:, 1],
            cuts=_cuts(edges, first[:, 0], last[:, 1]),
        )

    @property
    def seq_len(self) -> int:
        return self.edges[-1]

    @cached_property
    def _reach(self) -> list[tuple[int, int]]:
        return list(zip(self.first.tolist(), self.last.tolist(), strict=True))

    def before(self, position: int) -> int:
        """The pairs of the queries before a position; see [Note: pairs]."""
        segment = bisect_right(self.edges, position) - 1
        passed = position - self.edges[segment]
        if not passed:
            return self.below[segment]
        return self.below[segment] + int(passed * (self.keys[segment] + self.slopes[segment] * (passed - 1) / 2))

    def before_edges(self, edges: Sequence[int]) -> list[int]:
        """The pairs of the queries before each of some of the `edges`."""
        return [self.below[bisect_left(self.edges, edge)] for edge in edges]

    def pairs(self, start: int, stop: int) -> int:
        """The pairs of the queries from ``start`` to ``stop``."""
        return self.before(stop) - self.before(start)

    def with_token_cost(self, cost: float) -> Workload:
        """The same work with ``cost`` more pairs for every query."""
        below = [pairs + int(cost * edge) for pairs, edge in zip(self.below, self.edges, strict=True)]
        keys = [count + int(cost) for count in self.keys]
        return replace(self, below=below, keys=keys)

    def units(self, chunk: int) -> list[tuple[int, int]]:
        """The ``(start, stop)`` of documents, or other ranges between `cuts`. Consecutive short ones within the same
        ``chunk`` tokens are one unit.
        """
        starts = self.cuts[:-1]
        kept = [cut for before, cut in pairwise([-chunk, *starts]) if cut // chunk != before // chunk]
        return list(pairwise([*kept, self.seq_len]))

    def first_above(self, keys: float, start: int, stop: int) -> int:
        """The first edge of a unit after which queries see more than ``keys`` keys, if later queries see more."""
        low, high = bisect_left(self.edges, start), bisect_left(self.edges, stop)
        return self.edges[bisect_right(range(low, high), keys, key=self.keys.__getitem__) + low]

    def moved(self, held: Sequence[tuple[int, int]]) -> int:
        """How many keys outside of these ascending ranges their queries see, including gaps between visible keys."""
        seen = [self._seen_by(start, stop) for start, stop in held]
        total = end = 0
        for start, stop in sorted(seen):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
        return total - sum(stop - start for start, stop in held)

    def _seen_by(self, start: int, stop: int) -> tuple[int, int]:
        """The range from the first to the last of the queries ``start`` to ``stop`` and the keys that they see."""
        last = bisect_left(self.edges, stop) - 1
        first_key, end = self._reach[bisect_right(self.edges, start) - 1][0], self._reach[last][1]
        # With a causal mask, the segment's queries after ``stop`` would see further keys.
        return min(start, first_key), max(stop, end if end > self.edges[last + 1] else 0)


def _seen(masks: Sequence[Mask], at: Tensor, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """For queries at both ends of segments, ``[segments, 2]``: the number of visible keys, the first and the last."""
    count, first, last = torch.zeros_like(at), torch.full_like(at, _FAR), torch.zeros_like(at)
    for mask in masks:
        for lo, hi in mask.parts(at, seq_len):
            lo, hi = lo.clamp(0, seq_len), hi.clamp(0, seq_len)
            some = hi > lo
            count += torch.where(some, hi - lo, 0)
            first = torch.where(some, torch.minimum(first, lo), first)
            last = torch.where(some, torch.maximum(last, hi), last)
    return count.view(-1, 2), first.view(-1, 2), last.view(-1, 2)


def _cuts(edges: Tensor, first: Tensor, last: Tensor) -> list[int]:
    """The edges across which no query sees a key, in either direction."""
    if len(edges) == 1:
        return edges.tolist()
    behind = first.flip(0).cummin(0).values.flip(0)
    apart = torch.ones(len(edges), dtype=torch.bool)
    apart[1:-1] = (behind[1:] >= edges[1:-1]) & (last.cummax(0).values[:-1] <= edges[1:-1])
    return edges[apart].tolist()


def first_reaching(goal: float, start: int, stop: int, count: Callable[[int], int]) -> int:
    """The first position at which ``count``, which does not decrease, is at least ``goal``; ``stop`` if there is none.

    Interpolation and bisection alternate: if ``count`` rises linearly, interpolation needs a third of the calls.
    """
    if start == stop or (at_low := count(start)) >= goal:
        return start
    if (at_high := count(stop - 1)) < goal:
        return stop
    low, high, interpolate = start, stop - 1, True
    while high - low > 1:
        step = (high - low) * (goal - at_low) / (at_high - at_low) if interpolate else (high - low) / 2
        at = min(max(low + int(step), low + 1), high - 1)
        if (found := count(at)) < goal:
            low, at_low = at, found
        else:
            high, at_high = at, found
        interpolate = not interpolate
    return high
