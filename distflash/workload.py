"""What a mask asks of each token of a sequence, from few of its queries.

[Note: pairs] How many allowed pairs the queries before a position have is exact at the edges of segments. Within a
segment the number of keys that a query sees is taken to change evenly, as it does between a mask's `jumps`. Where a
mask has kinks elsewhere the counts are estimates: they say how a sequence is best dealt, and nothing else.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from distflash.masks import Mask

# Beyond any position.
_FAR = 2**62


@dataclass(frozen=True, eq=False)
class Workload:
    """The queries of a sequence, by segments.

    Attributes:
        edges: where segments end: ascending positions from 0 to S.
        below: allowed pairs of the queries before each edge.
        keys: by segments, the number of keys that its first query sees.
        slopes: by segments, how many keys more each further query sees.
        reach: by segments, the first key and one past the last key that its queries see.
        cuts: those edges, 0 and S among them, across which no query sees a key.
    """

    edges: list[int]
    below: list[int]
    keys: list[int]
    slopes: list[float]
    reach: list[tuple[int, int]]
    cuts: list[int]

    @staticmethod
    def of(masks: Sequence[Mask], seq_len: int, chunk: int) -> Workload:
        """Of one mask, or of several over the same positions, whose pairs add up.

        Looks at the queries at both ends of each segment: O(documents + seq_len / chunk).
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
            reach=list(zip(first[:, 0].tolist(), last[:, 1].tolist(), strict=True)),
            cuts=_cuts(edges, first[:, 0], last[:, 1]),
        )

    @property
    def seq_len(self) -> int:
        return self.edges[-1]

    @cached_property
    def _at_edges(self) -> dict[int, int]:
        return dict(zip(self.edges, self.below, strict=True))

    def before(self, position: int) -> int:
        """Pairs of the queries before a position; see [Note: pairs]."""
        at_edge = self._at_edges.get(position)
        if at_edge is not None:
            return at_edge
        segment = bisect_right(self.edges, position) - 1
        passed = position - self.edges[segment]
        return self.below[segment] + int(passed * (self.keys[segment] + self.slopes[segment] * (passed - 1) / 2))

    def pairs(self, start: int, stop: int) -> int:
        """Pairs of the queries from ``start`` on and before ``stop``."""
        return self.before(stop) - self.before(start)

    def with_token_cost(self, cost: float) -> Workload:
        """The same where every query has so many pairs more."""
        below = [pairs + int(cost * edge) for pairs, edge in zip(self.below, self.edges, strict=True)]
        keys = [count + int(cost) for count in self.keys]
        return Workload(self.edges, below, keys, self.slopes, self.reach, self.cuts)

    def units(self, chunk: int) -> list[tuple[int, int]]:
        """Where documents, or whatever no query sees across, start and stop. Short ones that follow one another within
        the same ``chunk`` tokens are one unit.
        """
        starts = self.cuts[:-1]
        kept = [cut for before, cut in pairwise([-chunk, *starts]) if cut // chunk != before // chunk]
        return list(pairwise([*kept, self.seq_len]))

    def first_above(self, keys: float, start: int, stop: int) -> int:
        """The first edge of a unit behind which queries see more than so many keys, if they see the more the later."""
        low, high = bisect_left(self.edges, start), bisect_left(self.edges, stop)
        return self.edges[bisect_right(range(low, high), keys, key=self.keys.__getitem__) + low]

    def moved(self, held: Sequence[tuple[int, int]]) -> int:
        """How many keys of others the queries of these ascending ranges see, gaps in what they see included."""
        seen = [self._seen_by(start, stop) for start, stop in held]
        total = end = 0
        for start, stop in sorted(seen):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
        return total - sum(stop - start for start, stop in held)

    def _seen_by(self, start: int, stop: int) -> tuple[int, int]:
        """A range around the queries ``start`` to ``stop`` and all keys that they see."""
        last = bisect_left(self.edges, stop) - 1
        first_key, end = self.reach[bisect_right(self.edges, start) - 1][0], self.reach[last][1]
        # Under a causal mask the queries of a segment that lie behind ``stop`` reach farther.
        return min(start, first_key), max(stop, end if end > self.edges[last + 1] else 0)


def _seen(masks: Sequence[Mask], at: Tensor, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries at both ends of segments, ``[segments, 2]``: how many keys each sees, from the first to the last."""
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
    """The edges behind which no query sees a key before them, and before which none sees a key behind them."""
    if len(edges) == 1:
        return edges.tolist()
    behind = first.flip(0).cummin(0).values.flip(0)
    apart = torch.ones(len(edges), dtype=torch.bool)
    apart[1:-1] = (behind[1:] >= edges[1:-1]) & (last.cummax(0).values[:-1] <= edges[1:-1])
    return edges[apart].tolist()
