"""The assignment of a sequence's tokens to ranks: equal tokens, nearly equal pairs, and few keys to send.

The sequence is a list of units (`Workload.units`). A unit with more pairs per token than the mean is *dense*, others
are *sparse*. The ranks are filled greedily, in order:

1. A rank takes dense units that fit, the largest first. If a unit fits no rank, the rank takes its end. In a causal
   document later queries see more keys, and a rank with some of its tokens needs all keys before them. So the fewest
   ranks need a document's keys if each takes as many pairs of its end as it may.
2. The rest of the rank's tokens are sparse: whole units, and the start of one more. The rank that takes the rest of
   this unit needs the keys of its start. With the end of a long document, the rank takes the sparsest tokens, so that
   this end can be large; otherwise it takes tokens with as many pairs as it still lacks.

The start of a long document, whose queries see fewer keys than the mean, is a sparse unit of its own. So there are
enough sparse tokens to balance the dense ones, and every rank gets its share of both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from distflash.workload import Workload

Piece = tuple[int, int]

# More tokens than any sequence has.
_ALL = 2**62


@dataclass(frozen=True)
class Aim:
    """How many pairs each rank should have.

    Attributes:
        limit: the upper bound, as a multiple of the mean over ranks.
        enough: the lower bound, as a fraction of the upper one. Below it a rank takes more dense tokens, even if that
            cuts a document.
    """

    limit: float = 1.049
    enough: float = 0.95


def assign(work: Workload, shares: Sequence[int] | None, ranks: int, aim: Aim, chunk: int) -> list[list[Piece]]:
    """The ascending, disjoint ``(start, stop)`` of each rank.

    Args:
        work: the pairs of the sequence's tokens.
        shares: the number of tokens of each rank; None for any number.
        ranks: the number of ranks.
        aim: how balanced the ranks should be.
        chunk: consecutive documents within this many tokens are one unit.
    """
    return [_joined(pieces) for pieces in _Assignment(work, shares, ranks, aim, chunk).by_rank()]


class _Unit(NamedTuple):
    """Tokens ``start`` to ``stop``, ordered by pairs per token, most first. Of equal units the last one is first."""

    order: tuple[float, int]
    start: int
    stop: int
    tokens: int
    pairs: int

    @property
    def density(self) -> float:
        return -self.order[0]

    @staticmethod
    def of(work: Workload, start: int, stop: int) -> _Unit:
        pairs = work.pairs(start, stop)
        return _Unit((-pairs / (stop - start), -start), start, stop, stop - start, pairs)


class _Sparse:
    """Units in descending order of pairs per token, as one sequence of tokens, which are taken from its end.

    So only the sums behind a unit that is taken have to be computed again.
    """

    def __init__(self, work: Workload, units: list[_Unit]) -> None:
        self.work, self.units = work, sorted(units)
        # Before each unit, and at the end.
        self.tokens, self.below = [0], [0]
        self._count_from(0)

    def _count_from(self, first: int) -> None:
        units = self.units[first:]
        self.tokens[first:] = accumulate(map(itemgetter(3), units), initial=self.tokens[first])
        self.below[first:] = accumulate(map(itemgetter(4), units), initial=self.below[first])

    @property
    def left(self) -> int:
        """The number of tokens."""
        return self.tokens[-1]

    def pairs(self, count: int, skipped: int = 0) -> int:
        """The pairs of the ``count`` sparsest tokens (or all that are left) after the ``skipped`` sparsest ones."""
        return self._of_sparsest(skipped + count) - (self._of_sparsest(skipped) if skipped else 0)

    def _of_sparsest(self, count: int) -> int:
        kept = self.tokens[-1] - count
        if kept <= 0:
            return self.below[-1]
        n = bisect_left(self.tokens, kept)
        pairs, cut = self.below[-1] - self.below[n], self.tokens[n] - kept
        if cut:
            start = self.units[n - 1].start
            pairs += self.work.pairs(start, start + cut)
        return pairs

    def window(self, count: int, pairs: float) -> int:
        """The number of tokens to skip, in whole units, so that the next ``count`` have at most ``pairs``."""
        units, tokens = len(self.units), self.tokens
        skips = range(1, units - bisect_left(tokens, count) + 1)
        skipped = bisect_right(skips, pairs, key=lambda n: self.pairs(count, tokens[-1] - tokens[units - n]))
        return tokens[-1] - tokens[units - skipped]

    def take(self, count: int, skipped: int = 0) -> tuple[list[Piece], Piece]:
        """Remove ``count`` tokens after the ``skipped`` sparsest: their pieces, and the rest of the last unit."""
        kept = self.tokens[-1] - skipped - count
        first, last = bisect_right(self.tokens, kept) - 1, bisect_left(self.tokens, kept + count)
        pieces = [(unit.start, unit.stop) for unit in self.units[first:last]]
        start, stop = pieces[0]
        end = stop - (kept - self.tokens[first])
        pieces[0] = start, end
        del self.units[first:last]
        self._count_from(first)
        return pieces, (end, stop)

    def take_unit_before(self, stop: int, most: int) -> Piece | None:
        """Remove and return the unit that ends at ``stop``, if it has at most ``most`` tokens."""
        n = next((n for n, unit in enumerate(self.units) if unit.stop == stop and unit.tokens <= most), None)
        return None if n is None else self.take(self.units[n].tokens, self.tokens[-1] - self.tokens[n + 1])[0][0]

    def put(self, unit: _Unit) -> None:
        """Add a unit."""
        n = bisect_left(self.units, unit)
        self.units.insert(n, unit)
        self._count_from(n)


class _Assignment:
    """The tokens that are not yet assigned."""

    def __init__(self, work: Workload, shares: Sequence[int] | None, ranks: int, aim: Aim, chunk: int) -> None:
        self.work, self.shares, self.ranks, self.aim = work, shares, ranks, aim
        self.pairs = work.before(work.seq_len)  # of tokens that are left
        self.mean = self.pairs / max(1, work.seq_len)
        # Without shares, sparse tokens are not needed to balance tokens: all units are dense, and none is too large.
        self.split_at = -1.0 if shares is None else self.mean
        self.most_tokens = _ALL if shares is None else max(shares)
        self.most_pairs = _ALL if shares is None else self.pairs / ranks
        units = [piece for unit in work.units(chunk) for piece in self._split(_Unit.of(work, *unit))]
        # By pairs.
        self.dense = sorted((unit for unit in units if unit.density > self.split_at), key=itemgetter(4))
        self.sparse = _Sparse(work, [unit for unit in units if unit.density <= self.split_at])

    def _split(self, unit: _Unit) -> list[_Unit]:
        """A unit that fits no rank, split at the token from which on queries see more keys than the mean."""
        if unit.pairs <= self.most_pairs and unit.tokens <= self.most_tokens:
            return [unit]
        at = min(unit.stop, self.work.first_above(self.mean, unit.start, unit.stop))
        pieces = (unit.start, at), (at, unit.stop)
        return [_Unit.of(self.work, *piece) for piece in pieces if piece[0] < piece[1]]

    def by_rank(self) -> Iterator[list[Piece]]:
        mean = self.pairs / self.ranks
        for rank in range(self.ranks - 1):
            # If earlier ranks got less than their share, the others get more.
            most = self.aim.limit * min(mean, self.pairs / (self.ranks - rank))
            share = _Share(self, _ALL if self.shares is None else self.shares[rank], most)
            share.take_dense()
            share.take_sparse()
            self.pairs -= share.pairs
            yield share.pieces
        yield [(unit.start, unit.stop) for unit in (*self.dense, *self.sparse.units)]

    def put(self, start: int, stop: int) -> None:
        """Add tokens that are not assigned."""
        if start == stop:
            return
        unit = _Unit.of(self.work, start, stop)
        if unit.density > self.split_at:
            insort(self.dense, unit, key=itemgetter(4))
        else:
            self.sparse.put(unit)


class _Share:
    """The tokens of one rank while it is filled.

    Attributes:
        room: the number of tokens that it still lacks.
        most, enough: the most and the fewest pairs that it should have.
    """

    def __init__(self, rest: _Assignment, tokens: int, most: float) -> None:
        self.rest, self.work, self.room = rest, rest.work, tokens
        self.most, self.enough = most, most * rest.aim.enough
        self.pieces: list[Piece] = []
        self.pairs = 0

    def hold(self, start: int, stop: int) -> None:
        self.pieces.append((start, stop))
        self.room -= stop - start
        self.pairs += self.work.pairs(start, stop)

    def least_with(self, tokens: int, pairs: int) -> int:
        """The pairs of this rank if it takes ``tokens`` with ``pairs``, and fills up with the sparsest tokens."""
        return self.pairs + pairs + self.rest.sparse.pairs(max(0, self.room - tokens))

    def take_dense(self) -> None:
        dense = self.rest.dense
        while dense and self.room > 0 and self.least_with(0, 0) < self.enough:
            fitting = (n for n in reversed(range(len(dense))) if self.fits(dense[n]))
            too_large = not self.pieces and not self.fits(dense[-1])
            at = None if too_large else next(fitting, None)
            if at is not None:
                self.take_whole(dense.pop(at))
                continue
            if not too_large and self.pairs + self.rest.sparse.pairs(self.room, self.window()) >= self.enough:
                return
            larger = (n for n in range(len(dense)) if self.least_with(dense[n].tokens, dense[n].pairs) > self.most)
            self.take_end(dense.pop(-1 if too_large else next(larger, -1)))
            return

    def fits(self, unit: _Unit) -> bool:
        return unit.tokens <= self.room and self.least_with(unit.tokens, unit.pairs) <= self.most

    def window(self) -> int:
        """The number of sparse tokens to skip, so that the rank has about as many pairs as it should."""
        if self.least_with(0, 0) >= self.enough:
            return 0
        return self.rest.sparse.window(self.room, self.most - self.pairs)

    def take_whole(self, unit: _Unit) -> None:
        """Take a dense unit, and the start of its document, if that was split off and fits: its keys are local then."""
        self.hold(unit.start, unit.stop)
        beginning = self.rest.sparse.take_unit_before(unit.start, self.room)
        if beginning is not None:
            self.hold(*beginning)

    def take_end(self, unit: _Unit) -> None:
        """Take the end of a dense unit: as much as the rank may have if it fills up with the sparsest tokens."""
        before, sparse, room = self.work.before, self.rest.sparse, self.room
        first, stop = max(unit.start, unit.stop - room), unit.stop
        most = before(stop) + self.pairs - self.most  # pairs before the end, less those of the sparsest tokens
        at = _first_reaching(most, first, stop, lambda p: before(p) - sparse.pairs(room - stop + p))
        if self.rest.shares is not None:
            at = max(first, min(at, stop - room + sparse.left))
        if at < stop:
            self.hold(at, stop)
        self.rest.put(unit.start, at)

    def take_sparse(self) -> None:
        """Take the remaining tokens: sparse ones, and dense ones if there are too few."""
        if self.rest.shares is None:
            return
        sparse = self.rest.sparse
        while self.room > sparse.left:
            unit = self.rest.dense.pop(0)
            taken = min(self.room - sparse.left, unit.tokens)
            self.hold(unit.start, unit.start + taken)
            self.rest.put(unit.start + taken, unit.stop)
        if self.room:
            pieces, rest = sparse.take(self.room, self.window())
            for piece in pieces:
                self.hold(*piece)
            self.rest.put(*rest)


def _first_reaching(goal: float, start: int, stop: int, count: Callable[[int], int]) -> int:
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


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces in ascending order, with adjacent ones joined."""
    joined: list[Piece] = []
    for start, stop in sorted(pieces):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
