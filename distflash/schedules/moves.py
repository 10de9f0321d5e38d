"""The transfers of all ranks in one list, as a schedule makes it, and the part of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from distflash.plan import Stage, Transfer, What

Rows = tuple[range, ...]


@dataclass(frozen=True)
class Move:
    """One transfer, for both of its ranks. ``at_sender`` and ``at_receiver`` are their `Transfer.rows`."""

    what: What
    stage: int
    until: int
    sender: int
    receiver: int
    of: int
    count: int
    at_sender: Rows | None = None
    at_receiver: Rows | None = None

    def seen_by(self, rank: int) -> Iterator[Transfer]:
        if rank == self.sender:
            yield Transfer(True, self.what, self.of, self.receiver, self.count, self.until, self.at_sender)
        if rank == self.receiver:
            yield Transfer(False, self.what, self.of, self.sender, self.count, self.until, self.at_receiver)


def transfers(moves: Sequence[Move], rank: int, stage: int) -> tuple[Transfer, ...]:
    """The transfers of a rank in one stage, in the order of ``moves``, which is the same on every rank."""
    return tuple(transfer for move in moves if move.stage == stage for transfer in move.seen_by(rank))


def in_order(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages, with `Pass.first` and `Pass.last` set for the first and last pass of each rank's queries."""
    every = [each for stage in stages for each in stage.passes]
    first = {each.queries: id(each) for each in reversed(every)}
    last = {each.queries: id(each) for each in every}
    return tuple(
        replace(
            stage,
            passes=tuple(
                replace(each, first=first[each.queries] == id(each), last=last[each.queries] == id(each))
                for each in stage.passes
            ),
        )
        for stage in stages
    )
