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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

from distflash.workload import Workload, first_reaching

Piece = tuple[int, int]

# The pairs of a unit.
_PAIRS = itemgetter(4)
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


class Assigned(NamedTuple):
    """The tokens of all ranks.

    Attributes:
        held: the ascending, disjoint ``(start, stop)`` of each rank.
        most: the pairs of the rank that has most.
    """

    held: list[list[Piece]]
    most: int


def assign(
    work: Workload, shares: Sequence[int] | None, ranks: int, aims: Iterable[Aim], chunk: int
) -> Iterator[Assigned]:
    """An assignment for each aim, computed when it is asked for.

    Args:
        work: the pairs of the sequence's tokens.
        shares: the number of tokens of each rank; None for any number.
        ranks: the number of ranks.
        aims: how balanced the ranks should be.
        chunk: consecutive documents within this many tokens are one unit.
    """
    units = _Units.of(work, shares, ranks, chunk)
    for aim in aims:
        of_ranks = list(_Assignment(units, aim).by_rank())
        yield Assigned([_joined(pieces) for pieces, _ in of_ranks], max(pairs for _, pairs in of_ranks))


class _Unit(NamedTuple):
    """Tokens ``start`` to ``stop``, ordered by pairs per token, most first. Of equal units the last one is first.

    Attributes:
        order: by which units are sorted.
        tokens: ``stop - start``.
        pairs: of these tokens.
        before: the pairs of the tokens before ``start``.
    """

    order: tuple[float, int]
    start: int
    stop: int
    tokens: int
    pairs: int
    before: int

    @property
    def density(self) -> float:
        return -self.order[0]

    @staticmethod
    def of(work: Workload, start: int, stop: int) -> _Unit:
        return _Unit.between(start, stop, work.before(start), work.before(stop))

    @staticmethod
    def between(start: int, stop: int, before: int, after: int) -> _Unit:
        """Of the pairs of the tokens before ``start`` and of those before ``stop``."""
        tokens, pairs = stop - start, after - before
        return _Unit((-pairs / tokens, -start), start, stop, tokens, pairs, before)

    def cut(self, work: Workload, at: int) -> tuple[_Unit | None, _Unit | None]:
        """The tokens before position ``at``, and the others; None if there are none."""
        if at <= self.start:
            return None, self
        if at >= self.stop:
            return self, None
        before = work.before(at)
        after = self.before + self.pairs
        return _Unit.between(self.start, at, self.before, before), _Unit.between(at, self.stop, before, after)


class _Sparse:
    """Units in descending order of pairs per token, as one sequence of tokens, which are taken from its end.

    So only the sums behind a unit that is taken have to be computed again.
    """

    def __init__(self, work: Workload, split_at: float, units: Iterable[_Unit]) -> None:
        self.work, self.split_at, self.units = work, split_at, sorted(units)
        self._ends_at = {unit.stop: unit for unit in self.units}  # also some that have been taken
        # Before each unit, and at the end.
        self.tokens, self.below = [0], [0]
        self._count_from(0)

    def _count_from(self, first: int) -> None:
        units = self.units[first:]
        # By indices, which takes half the time of names.
        self.tokens[first:] = accumulate([unit[3] for unit in units], initial=self.tokens[first])
        self.below[first:] = accumulate([unit[4] for unit in units], initial=self.below[first])

    @property
    def left(self) -> int:
        """The number of tokens."""
        return self.tokens[-1]

    def pairs(self, count: int, skipped: int = 0) -> int:
        """The pairs of the ``count`` sparsest tokens (or all that are left) after the ``skipped`` sparsest ones."""
        return self.of_sparsest(skipped + count) - (self.of_sparsest(skipped) if skipped else 0)

    def of_sparsest(self, count: int) -> int:
        """The pairs of the ``count`` sparsest tokens, or of all that are left."""
        tokens, below = self.tokens, self.below
        kept = tokens[-1] - count
        if kept <= 0:
            return below[-1]
        n = bisect_left(tokens, kept)
        cut = tokens[n] - kept
        if not cut:
            return below[-1] - below[n]
        unit = self.units[n - 1]
        return below[-1] - below[n] + self.work.before(unit.start + cut) - unit.before

    def window(self, count: int, pairs: float) -> int:
        """The number of tokens to skip, in whole units, so that the next ``count`` have at most ``pairs``."""
        units, tokens = len(self.units), self.tokens
        skips = range(1, units - bisect_left(tokens, count) + 1)
        skipped = bisect_right(skips, pairs, key=lambda n: self.pairs(count, tokens[-1] - tokens[units - n]))
        return tokens[-1] - tokens[units - skipped]

    def take(self, count: int, skipped: int = 0) -> tuple[list[_Unit], _Unit | None]:
        """Remove ``count`` tokens after the ``skipped`` sparsest.

        Returns:
            The tokens as units. And what is left of the last one, if it is dense and so was removed, too.
        """
        kept = self.tokens[-1] - skipped - count
        first, last = bisect_right(self.tokens, kept) - 1, bisect_left(self.tokens, kept + count)
        taken = self.units[first:last]
        start, rest = taken[0].cut(self.work, taken[0].stop - (kept - self.tokens[first]))
        if start is not None:
            taken[0] = start
        del self.units[first:last]
        if rest is None or rest.density > self.split_at:
            self._count_from(first)
            return taken, rest
        self._count_from(min(first, self._insert(rest)))
        return taken, None

    def take_unit_before(self, stop: int, most: int) -> _Unit | None:
        """Remove and return the unit that ends at ``stop``, if it has at most ``most`` tokens."""
        unit = self._ends_at.get(stop)
        if unit is None or unit.tokens > most:
            return None
        n = bisect_left(self.units, unit)
        if self.units[n : n + 1] != [unit]:
            return None
        del self.units[n]
        self._count_from(n)
        return unit

    def put(self, unit: _Unit) -> None:
        """Add a unit."""
        self._count_from(self._insert(unit))

    def _insert(self, unit: _Unit) -> int:
        n = bisect_left(self.units, unit)
        self.units.insert(n, unit)
        self._ends_at[unit.stop] = unit
        return n


@dataclass(frozen=True)
class _Units:
    """The units before any is assigned.

    Attributes:
        work, shares, ranks: as in `assign`.
        split_at: the most pairs per token of a sparse unit.
        dense: in ascending order of pairs.
        sparse: the others, sorted.
    """

    work: Workload
    shares: Sequence[int] | None
    ranks: int
    split_at: float
    dense: list[_Unit]
    sparse: list[_Unit]

    @staticmethod
    def of(work: Workload, shares: Sequence[int] | None, ranks: int, chunk: int) -> _Units:
        starts = [start for start, _ in work.units(chunk)]
        edges = [*starts, work.seq_len]
        before = work.before_edges(edges)
        units = list(map(_Unit.between, starts, edges[1:], before, before[1:]))
        # Without shares, sparse tokens are not needed to balance tokens: all units are dense, and none is too large.
        split_at = -1.0
        if shares is not None:
            split_at = before[-1] / max(1, work.seq_len)
            tokens, pairs = max(shares), before[-1] / ranks
            parts = [
                (unit,) if unit.pairs <= pairs and unit.tokens <= tokens else _split(work, unit, split_at)
                for unit in units
            ]
            units = list(chain.from_iterable(parts))
        dense = [unit for unit in units if unit.order[0] < -split_at]
        sparse = [unit for unit in units if unit.order[0] >= -split_at]
        return _Units(work, shares, ranks, split_at, sorted(dense, key=_PAIRS), sorted(sparse))


class _Assignment:
    """The tokens that are not yet assigned."""

    def __init__(self, units: _Units, aim: Aim) -> None:
        self.work, self.shares, self.ranks, self.aim = units.work, units.shares, units.ranks, aim
        self.split_at = units.split_at
        self.pairs = self.work.before(self.work.seq_len)  # of tokens that are left
        self.dense, self.sparse = list(units.dense), _Sparse(self.work, units.split_at, units.sparse)

    def by_rank(self) -> Iterator[tuple[list[Piece], int]]:
        """The pieces of each rank, and their pairs."""
        mean = self.pairs / self.ranks
        for rank in range(self.ranks - 1):
            # If earlier ranks got less than their share, the others get more.
            most = self.aim.limit * min(mean, self.pairs / (self.ranks - rank))
            share = _Share(self, _ALL if self.shares is None else self.shares[rank], most)
            share.take_dense()
            share.take_sparse()
            self.pairs -= share.pairs
            yield share.pieces, share.pairs
        yield [(unit.start, unit.stop) for unit in (*self.dense, *self.sparse.units)], self.pairs

    def put(self, unit: _Unit | None) -> None:
        """Add tokens that are not assigned."""
        if unit is None:
            return
        if unit.density > self.split_at:
            insort(self.dense, unit, key=_PAIRS)
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

    def hold(self, unit: _Unit | None) -> None:
        if unit is not None:
            self.pieces.append((unit.start, unit.stop))
            self.room -= unit.tokens
            self.pairs += unit.pairs

    def least_with(self, tokens: int, pairs: int) -> int:
        """The pairs of this rank if it takes ``tokens`` with ``pairs``, and fills up with the sparsest tokens."""
        return self.pairs + pairs + self.rest.sparse.pairs(max(0, self.room - tokens))

    def take_dense(self) -> None:
        dense = self.rest.dense
        while dense and self.room > 0 and self.least_with(0, 0) < self.enough:
            too_large = not self.pieces and not self.fits(dense[-1])
            at = None if too_large else self.largest_fitting()
            if at is not None:
                self.take_whole(dense.pop(at))
                continue
            if not too_large and self.pairs + self.rest.sparse.pairs(self.room, self.window()) >= self.enough:
                return
            larger = (n for n in range(len(dense)) if self.least_with(dense[n].tokens, dense[n].pairs) > self.most)
            self.take_end(dense.pop(-1 if too_large else next(larger, -1)))
            return

    def largest_fitting(self) -> int | None:
        """The index of the dense unit with most pairs that fits."""
        dense = self.rest.dense
        # Units with more pairs do not fit, whatever they are filled up with. 1: the difference is rounded.
        few = bisect_right(dense, self.most - self.pairs + 1, key=_PAIRS)
        return next((n for n in reversed(range(few)) if self.fits(dense[n])), None)

    def fits(self, unit: _Unit) -> bool:
        return unit.tokens <= self.room and self.least_with(unit.tokens, unit.pairs) <= self.most

    def window(self) -> int:
        """The number of sparse tokens to skip, so that the rank has about as many pairs as it should."""
        if self.least_with(0, 0) >= self.enough:
            return 0
        return self.rest.sparse.window(self.room, self.most - self.pairs)

    def take_whole(self, unit: _Unit) -> None:
        """Take a dense unit, and the start of its document, if that was split off and fits: its keys are local then."""
        self.hold(unit)
        self.hold(self.rest.sparse.take_unit_before(unit.start, self.room))

    def take_end(self, unit: _Unit) -> None:
        """Take the end of a dense unit: as much as the rank may have if it fills up with the sparsest tokens."""
        before, of_sparsest, room = self.work.before, self.rest.sparse.of_sparsest, self.room
        first, stop = max(unit.start, unit.stop - room), unit.stop
        # Pairs before the end, less those of the sparsest tokens.
        most = unit.before + unit.pairs + self.pairs - self.most
        at = first_reaching(most, first, stop, lambda p: before(p) - of_sparsest(room - stop + p))
        if self.rest.shares is not None:
            at = max(first, min(at, stop - room + self.rest.sparse.left))
        start, end = unit.cut(self.work, at)
        self.hold(end)
        self.rest.put(start)

    def take_sparse(self) -> None:
        """Take the remaining tokens: sparse ones, and dense ones if there are too few."""
        if self.rest.shares is None:
            return
        sparse = self.rest.sparse
        while self.room > sparse.left:
            unit = self.rest.dense.pop(0)
            start, end = unit.cut(self.work, unit.start + self.room - sparse.left)
            self.hold(start)
            self.rest.put(end)
        if self.room:
            taken, rest = sparse.take(self.room, self.window())
            self.pieces += [(unit.start, unit.stop) for unit in taken]
            self.pairs += sum([unit.pairs for unit in taken])
            self.rest.put(rest)


def _split(work: Workload, unit: _Unit, keys: float) -> list[_Unit]:
    """A unit at the token from which on queries see more than ``keys`` keys."""
    parts = unit.cut(work, work.first_above(keys, unit.start, unit.stop))
    return [part for part in parts if part is not None]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces in ascending order, with adjacent ones joined."""
    joined: list[Piece] = []
    for start, stop in sorted(pieces):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
