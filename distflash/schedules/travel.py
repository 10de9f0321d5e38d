"""Schedules that send K/V and keep Q: rings and all-gather.

A message holds only the keys that its receiver needs. They come from the rank that `route` names if that rank has all
of them, otherwise directly from their source. No rank forwards keys that it does not need itself. dK and dV are sent
directly to the source, which adds them in float32 in the order of the steps, so results are reproducible.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from distflash.geometry import Geometry, Needs
from distflash.plan import Pass, Plan, Stage, What
from distflash.schedules.base import Schedule, passes_over
from distflash.schedules.moves import Move, Rows, in_order, transfers


class KeysTravel(Schedule):
    """A schedule given by two functions: which sources a rank attends to in each step, and who sends it their keys."""

    @abstractmethod
    def sources(self, rank: int, world_size: int) -> tuple[tuple[int, ...], ...]:
        """The sources of each step. Every rank has equally many steps, and the first is its local keys alone."""

    def route(self, rank: int, source: int, world_size: int) -> int:
        """The rank that sends ``rank`` the source's keys; by default the source itself.

        If the named rank does not have them in time, the source sends them.
        """
        return source

    def ahead(self, rank: int, source: int, world_size: int) -> int:
        """Prefetch distance, in steps, for K/V sent directly by their source rank."""
        return 1

    def plan(self, geometry: Geometry, rank: int) -> Plan:
        needs = geometry.needs
        travel = self._travel(needs)
        work = [_passes(geometry, needs, rank, sources) for sources in travel.steps[rank]]
        last = len(work) - 1
        moves = [*travel.keys(rank)]
        forward = [Stage(transfers(moves, rank, n), passes) for n, passes in enumerate(work)]
        stages = last + 2 if any(travel.remote()) else last + 1
        both = [*moves, *travel.gradients(rank)]
        backward = [Stage(transfers(both, rank, n), work[n] if n <= last else ()) for n in range(stages)]
        return Plan(
            rank=rank,
            forward=in_order(forward),
            backward=in_order(backward),
            lengths=tuple(geometry.keys.length(r) for r in range(geometry.world_size)),
            rows={source: needs.rows[rank][source] for sources in travel.steps[rank][1:] for source in sources},
            pairs=needs.pairs,
            remote=needs.remote,
        )

    def _travel(self, needs: Needs) -> _Travel:
        """The transfers. Steps in which no rank computes are left out."""
        ranks = range(len(needs.rows))
        every = [self.sources(rank, len(ranks)) for rank in ranks]
        steps = [[tuple(s for s in sources if needs.any_pair(rank, s)) for sources in every[rank]] for rank in ranks]
        kept = [n for n in range(len(steps[0])) if n == 0 or any(steps[rank][n] for rank in ranks)]
        return _Travel(self, needs, kept, [[steps[rank][n] for n in kept] for rank in ranks])


@dataclass(frozen=True)
class _Travel:
    """The transfers of a plan, in the same order on every rank.

    Attributes:
        kept: the schedule's steps in which any rank computes; the n-th of them is stage n.
        steps: by rank and stage, the sources that the rank attends to.
    """

    schedule: KeysTravel
    needs: Needs
    kept: list[int]
    steps: list[list[tuple[int, ...]]]

    def remote(self) -> Iterator[tuple[int, int, int]]:
        """``(stage, rank, source)`` of every stage in which a rank attends to remote keys."""
        for step in range(1, len(self.steps[0])):
            for rank, of_rank in enumerate(self.steps):
                yield from ((step, rank, source) for source in of_rank[step])

    def keys(self, rank: int) -> Iterator[Move]:
        """The keys that ``rank`` sends or receives. Those of other ranks would take most of a plan's time."""
        for step, reader, source in self.remote():
            if rank not in (reader, source, self.schedule.route(reader, source, len(self.steps))):
                continue
            wanted = self.needs.rows[reader][source]
            peer, stage, held = self._from(step, reader, source, wanted)
            if rank in (reader, peer):
                count = sum(map(len, wanted))
                yield Move(What.KEYS, stage, step, peer, reader, source, count, among(wanted, held), None)

    def gradients(self, rank: int) -> Iterator[Move]:
        """The gradients of keys that ``rank`` sends or receives."""
        for step, reader, source in self.remote():
            if rank in (reader, source):
                rows = self.needs.rows[reader][source]
                count = sum(map(len, rows))
                yield Move(What.KEY_GRADIENTS, step + 1, step + 2, reader, source, source, count, None, rows)

    def _from(self, step: int, rank: int, source: int, wanted: Rows) -> tuple[int, int, Rows | None]:
        """The sender of the keys, the stage of the send, and which of the source's keys the sender has (None: all)."""
        peer = self.schedule.route(rank, source, len(self.steps))
        held = self.needs.rows[peer][source]
        if peer != source and contains(held, wanted):
            earlier = [n for n in range(1, step) if source in self.steps[peer][n]]
            if earlier:
                return peer, earlier[-1], held
        departure = self.kept[step] - self.schedule.ahead(rank, source, len(self.steps))
        return source, max(0, bisect_right(self.kept, departure) - 1), None


def _passes(geometry: Geometry, needs: Needs, rank: int, sources: Sequence[int]) -> tuple[Pass, ...]:
    each = [passes_over(geometry, rank, s, None if s == rank else needs.rows[rank][s]) for s in sources]
    return tuple(p for passes in each for p in passes)


def contains(held: Rows, wanted: Rows) -> bool:
    """Whether ``held`` contains all of ``wanted``. Both are ascending."""
    starts = [h.start for h in held]
    around = (bisect_right(starts, w.start) - 1 for w in wanted)
    return all(n >= 0 and w.stop <= held[n].stop for n, w in zip(around, wanted, strict=True))


def among(wanted: Rows, held: Rows | None) -> Rows | None:
    """``wanted`` as ranges of indices into ``held``, which contains it; None if both are equal."""
    if held is None:
        return wanted
    if wanted == held:
        return None
    starts = [h.start for h in held]
    # How much smaller an index into ``held`` is than the token's own.
    before = accumulate(map(len, held), initial=0)
    less = [start - count for start, count in zip(starts, before, strict=False)]
    moved = ((w, less[bisect_right(starts, w.start) - 1]) for w in wanted)
    return tuple(range(w.start - by, w.stop - by) for w, by in moved)
