"""A plan whose kernel calls do not depend on the number of ranks: each is of one chunk of queries or keys.

`Pass.queries` and `Pass.sources` are the number of a chunk here, not a rank. There are two kinds of passes: a chunk of
this rank's queries over all keys that it sees, and (`Gradients.OF_KEYS`) all queries that see a chunk of this rank's
keys, over that chunk. Both are in the order of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from distflash.host_to_device import to_device
from distflash.pieces import Chunks, Ranges, joined
from distflash.plan import Gradients, Pass, Plan


@dataclass(frozen=True, eq=False)
class Piece:
    """A chunk of this rank's queries (or keys), and the keys (or queries) that kernel calls pair with it.

    Attributes:
        number: the chunk's number in the sequence.
        own: its local indices.
        others: indices into `GatheredChunks`, as ascending ranges.
    """

    number: int
    own: range
    others: Ranges


@dataclass(frozen=True, eq=False)
class GatheredChunks:
    """Chunks received from several ranks, concatenated in the order of their positions.

    Attributes:
        ranks: the ranks that hold them. Before sorting, tokens are in the order of these ranks.
        own: the local indices of this rank's tokens among them.
        order: int64, the permutation that sorts the tokens.
        ranges: for each chunk's number, its range after sorting.
    """

    ranks: tuple[int, ...]
    own: Ranges
    order: Tensor
    ranges: Mapping[int, range]

    @staticmethod
    def of(chunks: Chunks, numbers: list[int], rank: int) -> GatheredChunks:
        """The chunks with these ascending numbers, received by ``rank``."""
        owners = chunks.owners.tolist()
        ranks = sorted({owners[n] for n in numbers})
        before = _concatenated(chunks, [n for source in ranks for n in numbers if owners[n] == source])
        order = [torch.arange(before[n].start, before[n].stop) for n in numbers]
        return GatheredChunks(
            tuple(ranks),
            joined(chunks.local(n) for n in numbers if owners[n] == rank),
            torch.cat([torch.empty(0, dtype=torch.int64), *order]),
            _concatenated(chunks, numbers),
        )

    def to(self, device: torch.device) -> GatheredChunks:
        return replace(self, order=to_device(self.order, device))


def _concatenated(chunks: Chunks, numbers: list[int]) -> dict[int, range]:
    ranges, start = {}, 0
    for n in numbers:
        ranges[n] = range(start, start + len(chunks.ranges[n]))
        start = ranges[n].stop
    return ranges


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkwisePlan(Plan):
    """What one rank does in a call whose kernel calls are of fixed chunks.

    Attributes:
        of_queries: this rank's chunks of queries and the keys that each sees, for the output and dQ.
        of_keys: this rank's chunks of keys and the queries that see each, for dK and dV.
        keys, queries: local and received ones; queries in backward only.
        owners: for each chunk of queries, the rank that holds it.
    """

    of_queries: tuple[Piece, ...]
    of_keys: tuple[Piece, ...]
    keys: GatheredChunks
    queries: GatheredChunks
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
