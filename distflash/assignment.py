"""A sequence dealt to ranks: equally many tokens and nearly equally many pairs each, and few keys to move.

The sequence is a list of units (`Workload.units`). One with more pairs a token than the mean is *dense*, others are
*sparse*. The ranks are filled one after the other:

1. Dense units that fit are taken whole, the largest first. Of one that fits no rank, the end is taken: the queries of
   a causal document see the more keys the later they are, and whoever holds some of them needs all keys before them,
   so that a document is moved to fewest ranks if each takes as many pairs of its end as it may.
2. The rest of the rank's tokens are sparse: units whole, and the beginning of one more. Whoever takes the rest of that
   one needs these keys, and no more of it. Behind the end of a long document come the sparsest tokens, so that this end
   is large; else those that have as many pairs as are missing.

The beginning of a long document, where queries see less keys than the mean, is a sparse unit by itself. So sparse
tokens make up for dense ones as long as there are any, and every rank can have its share of both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from distflash.workload import Workload

Piece = tuple[int, int]

# More than any sequence has.
_ALL = 2**62


@dataclass(frozen=True)
class Aim:
    """What each rank should have.

    Attributes:
        limit: how many times the mean of the pairs it has at most where that can be.
        enough: with less than this part of that, it takes more dense tokens, though a document be cut for it.
    """

    limit: float = 1.049
    enough: float = 0.95


def assign(work: Workload, shares: Sequence[int] | None, ranks: int, aim: Aim, chunk: int) -> list[list[Piece]]:
    """The ascending, disjoint ``(start, stop)`` of each rank.

    Args:
        work: what the tokens of the sequence ask for.
        shares: how many tokens each rank has, all of them together; None for any number.
        ranks: how many there are.
        aim: how balanced they are to be.
        chunk: documents that follow one another within so many tokens are dealt together.
    """
    return [_joined(pieces) for pieces in _Assignment(work, shares, ranks, aim, chunk).by_rank()]


class _Unit(NamedTuple):
    """Tokens ``start`` to ``stop``, ordered by their pairs a token."""

    density: float
    start: int
    stop: int
    tokens: int
    pairs: int

    @staticmethod
    def of(work: Workload, start: int, stop: int) -> _Unit:
        pairs = work.pairs(start, stop)
        return _Unit(pairs / (stop - start), start, stop, stop - start, pairs)


class _Sparse:
    """Units, those with the fewest pairs a token first, as one line of tokens."""

    def __init__(self, work: Workload, units: list[_Unit]) -> None:
        self.work, self.units = work, sorted(units)
        self._count()

    def _count(self) -> None:
        self.tokens = [0, *accumulate(map(itemgetter(3), self.units))]
        self.below = [0, *accumulate(map(itemgetter(4), self.units))]

    @property
    def left(self) -> int:
        """How many tokens there are."""
        return self.tokens[-1]

    def pairs(self, count: int, skipped: int = 0) -> int:
        """Pairs of ``count`` tokens, or of fewer if fewer are left, behind the units of those that are skipped."""
        return self._before(skipped + count) - (self._before(skipped) if skipped else 0)

    def _before(self, tokens: int) -> int:
        n = bisect_right(self.tokens, tokens) - 1
        if n == len(self.units):
            return self.below[n]
        start = self.units[n].start
        return self.below[n] + self.work.pairs(start, start + tokens - self.tokens[n])

    def window(self, count: int, pairs: float) -> int:
        """How many tokens to skip, whole units, so that ``count`` have nearly but not more than ``pairs``."""
        starts = range(1, bisect_right(self.tokens, self.tokens[-1] - count))
        return self.tokens[bisect_right(starts, pairs, key=lambda n: self.pairs(count, self.tokens[n]))]

    def take(self, count: int, skipped: int = 0) -> tuple[list[Piece], Piece]:
        """The pieces of ``count`` tokens behind the units of those that are skipped, and the rest of the last one."""
        first, last = bisect_left(self.tokens, skipped), bisect_left(self.tokens, skipped + count)
        taken = self.units[first:last]
        del self.units[first:last]
        pieces = [(unit.start, unit.stop) for unit in taken]
        start, stop = pieces[-1]
        end = stop - (self.tokens[last] - skipped - count)
        pieces[-1] = start, end
        self._count()
        return pieces, (end, stop)

    def take_unit_before(self, stop: int, most: int) -> Piece | None:
        """The unit that ends there, if it has at most so many tokens."""
        n = next((n for n, unit in enumerate(self.units) if unit.stop == stop and unit.tokens <= most), None)
        return None if n is None else self.take(self.units[n].tokens, self.tokens[n])[0][0]

    def put(self, unit: _Unit) -> None:
        """Back into the line."""
        insort(self.units, unit)
        self._count()


class _Assignment:
    """What is not yet dealt."""

    def __init__(self, work: Workload, shares: Sequence[int] | None, ranks: int, aim: Aim, chunk: int) -> None:
        self.work, self.shares, self.ranks, self.aim = work, shares, ranks, aim
        self.pairs = work.before(work.seq_len)  # that are left
        self.mean = self.pairs / max(1, work.seq_len)
        # Without shares nothing has to make up for anything: all is dense.
        self.split_at = -1.0 if shares is None else self.mean
        units = [piece for unit in work.units(chunk) for piece in self._split(_Unit.of(work, *unit))]
        # By pairs.
        self.dense = sorted((unit for unit in units if unit.density > self.split_at), key=itemgetter(4))
        self.sparse = _Sparse(work, [unit for unit in units if unit.density <= self.split_at])

    def _split(self, unit: _Unit) -> list[_Unit]:
        """A unit that no rank can take, before and behind the token from which on queries see more than the mean."""
        if self.shares is None or not (unit.pairs * self.ranks > self.pairs or unit.tokens > max(self.shares)):
            return [unit]
        at = min(unit.stop, self.work.first_above(self.mean, unit.start, unit.stop))
        pieces = (unit.start, at), (at, unit.stop)
        return [_Unit.of(self.work, *piece) for piece in pieces if piece[0] < piece[1]]

    def by_rank(self) -> Iterator[list[Piece]]:
        mean = self.pairs / self.ranks
        for rank in range(self.ranks - 1):
            # Where earlier ranks had less than their share, all others have more.
            most = self.aim.limit * min(mean, self.pairs / (self.ranks - rank))
            share = _Share(self, _ALL if self.shares is None else self.shares[rank], most)
            share.take_dense()
            share.take_sparse()
            self.pairs -= share.pairs
            yield share.pieces
        yield [(unit.start, unit.stop) for unit in (*self.dense, *self.sparse.units)]

    def put(self, start: int, stop: int) -> None:
        """Back to what is not dealt."""
        if start == stop:
            return
        unit = _Unit.of(self.work, start, stop)
        if unit.density > self.split_at:
            insort(self.dense, unit, key=itemgetter(4))
        else:
            self.sparse.put(unit)


class _Share:
    """One rank's part while it is filled.

    Attributes:
        room: tokens that are missing.
        most, enough: pairs that it should have, at most and at least.
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
        """The pairs of this rank if it takes so many tokens and pairs, and the sparsest tokens there are."""
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
        """How many sparse tokens to skip so that those behind them bring the rank near to its aim."""
        if self.least_with(0, 0) >= self.enough:
            return 0
        return self.rest.sparse.window(self.room, self.most - self.pairs)

    def take_whole(self, unit: _Unit) -> None:
        """And its beginning, if that was split off and fits: it need not be moved then."""
        self.hold(unit.start, unit.stop)
        beginning = self.rest.sparse.take_unit_before(unit.start, self.room)
        if beginning is not None:
            self.hold(*beginning)

    def take_end(self, unit: _Unit) -> None:
        """As much as the rank may have beside the sparsest tokens, and what is missing where there are too few."""
        before, sparse, room = self.work.before, self.rest.sparse, self.room
        first, stop = max(unit.start, unit.stop - room), unit.stop
        most = before(stop) + self.pairs - self.most  # pairs before the end, less those of the sparsest tokens
        at = first + bisect_left(range(first, stop), most, key=lambda p: before(p) - sparse.pairs(room - stop + p))
        if self.rest.shares is not None:
            at = max(first, min(at, stop - room + sparse.left))
        if at < stop:
            self.hold(at, stop)
        self.rest.put(unit.start, at)

    def take_sparse(self) -> None:
        """Fill the rank up."""
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


def _joined(pieces: list[Piece]) -> list[Piece]:
    """In ascending order, those that touch as one."""
    joined: list[Piece] = []
    for start, stop in sorted(pieces):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
