"""A plan whose kernel calls are of fixed chunks: the same calls, on whichever rank, whatever the number of ranks.

What travels and when is a plan's as everywhere. But its passes are of a *chunk* instead of a rank: `Pass.queries` and
`Pass.sources` are the chunk's number. A pass of queries is a chunk of this rank's queries over all keys that it sees,
in the order of positions; a pass of keys (`Gradients.OF_KEYS`) is all queries that see a chunk of this rank's keys over
that chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from distflash.pieces import Chunks, Ranges, joined
from distflash.plan import Gradients, Pass, Plan
from distflash.upload import upload


@dataclass(frozen=True, eq=False)
class Piece:
    """A chunk of this rank's tokens, and the tokens at hand that kernel calls set beside it.

    Attributes:
        number: of the chunk, in the sequence.
        own: among this rank's tokens.
        others: among those of `AtHand`, as ascending ranges.
    """

    number: int
    own: range
    others: Ranges


@dataclass(frozen=True, eq=False)
class AtHand:
    """Chunks of several ranks as one sequence, in the order of their positions.

    Attributes:
        ranks: whose tokens lie one after the other before they are put in order.
        own: of this rank's tokens, those that are taken.
        order: int64: by place in the sequence, the place before.
        places: by a chunk's number, where it is in the sequence.
    """

    ranks: tuple[int, ...]
    own: Ranges
    order: Tensor
    places: Mapping[int, range]

    @staticmethod
    def of(chunks: Chunks, numbers: list[int], rank: int) -> AtHand:
        """Of the chunks with these ascending numbers, on ``rank``."""
        owners = chunks.owners.tolist()
        ranks = sorted({owners[n] for n in numbers})
        before = _one_after_another(chunks, [n for source in ranks for n in numbers if owners[n] == source])
        order = [torch.arange(before[n].start, before[n].stop) for n in numbers]
        return AtHand(
            tuple(ranks),
            joined(chunks.local(n) for n in numbers if owners[n] == rank),
            torch.cat([torch.empty(0, dtype=torch.int64), *order]),
            _one_after_another(chunks, numbers),
        )

    def to(self, device: torch.device) -> AtHand:
        return replace(self, order=upload(self.order, device))


def _one_after_another(chunks: Chunks, numbers: list[int]) -> dict[int, range]:
    places, start = {}, 0
    for n in numbers:
        places[n] = range(start, start + len(chunks.ranges[n]))
        start = places[n].stop
    return places


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkwisePlan(Plan):
    """What one rank does in a call whose kernel calls are of fixed chunks.

    Attributes:
        of_queries: this rank's chunks of queries, and the keys that each sees: for the output and dQ.
        of_keys: its chunks of keys, and the queries that see each: for dK and dV.
        keys, queries: those at hand once all have arrived; queries in backward only.
        owners: by chunks of queries, the rank that holds it.
    """

    of_queries: tuple[Piece, ...]
    of_keys: tuple[Piece, ...]
    keys: AtHand
    queries: AtHand
    owners: tuple[int, ...]

    @property
    def sources(self) -> tuple[int, ...]:
        return self.keys.ranks

    def to(self, device: torch.device) -> ChunkwisePlan:
        moved = super().to(device)
        assert isinstance(moved, ChunkwisePlan)
        return replace(moved, keys=self.keys.to(device), queries=self.queries.to(device))

    @cached_property
    def _by_piece(self) -> dict[tuple[int, Gradients], tuple[Pass, ...]]:
        found: dict[tuple[int, Gradients], tuple[Pass, ...]] = {}
        for each in self.passes + self.backward_passes:
            name = each.queries, each.gradients
            found[name] = (*found.get(name, ()), each)
        return found

    def passes_over(self, piece: Piece, gradients: Gradients) -> tuple[Pass, ...]:
        """The kernel calls of a piece, one for each part of the mask. gradients: ``ALL`` for the forward's."""
        return self._by_piece.get((piece.number, gradients), ())

    def _words(self, each: Pass) -> str:
        (rows,) = each.visible
        if each.gradients is Gradients.OF_KEYS:
            return f"{len(rows.row_lo)} queries over chunk {each.queries}: {each.pairs} pairs, dK, dV"
        gradient = ", dQ" if each.gradients is Gradients.OF_QUERIES else ""
        return f"chunk {each.queries} over {len(rows.keys)} keys: {each.pairs} pairs{gradient}"
