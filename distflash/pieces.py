"""Chunks of tokens at positions that do not depend on the number of ranks, and which chunks see each other.

[Note: shapes] T local queries, N chunks of queries, M chunks of keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distflash.geometry import Geometry, Tokens

Ranges = tuple[range, ...]


@dataclass(frozen=True)
class Gathered(Tokens):
    """The tokens in ascending ranges of positions, on a single rank."""

    ranges: Ranges

    @property
    def world_size(self) -> int:
        return 1

    def length(self, rank: int) -> int:
        return sum(map(len, self.ranges))

    def positions(self, rank: int) -> Tensor:
        return torch.cat([torch.arange(r.start, r.stop) for r in self.ranges])

    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        count = torch.zeros_like(positions)
        for r in self.ranges:
            count += (positions - r.start).clamp_(0, len(r))
        return count


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a set of tokens, each held by one rank.

    Attributes:
        ranges: their positions, ascending.
        owners: for each chunk, the rank that holds it.
        starts: for each chunk, the local index of its first token on that rank.
    """

    ranges: Ranges
    owners: Tensor
    starts: list[int]

    @staticmethod
    def of(tokens: Tokens, size: int) -> Chunks:
        """``tokens`` in chunks of ``size``; the last of a sequence may be shorter.

        Raises:
            ValueError: several ranks hold parts of a chunk.
        """
        ranges, ranks = tokens.chunks(size), range(tokens.world_size)
        starts, stops = (torch.tensor(ends, dtype=torch.int64) for ends in _ends(ranges))
        before = torch.stack([tokens.count_below(starts, rank) for rank in ranks])
        held = torch.stack([tokens.count_below(stops, rank) for rank in ranks]) - before
        whole = held == stops - starts
        owners = whole.int().argmax(0)
        cut = (~whole.any(0)).nonzero().flatten().tolist()
        if cut:
            several = held[:, cut[0]].nonzero().flatten().tolist()
            raise ValueError(
                f"layout: reproducible attention in chunks of {size} tokens takes layouts that deal whole chunks, but "
                f"tokens {ranges[cut[0]].start} to {ranges[cut[0]].stop - 1} are on ranks {several}; take "
                f"layout=df.WholeChunks(df.Zigzag(), {size}), or a sequence length and a chunk (schedule="
                "df.Reproducible(chunk)) for which the layout cuts at multiples of the chunk"
            )
        return Chunks(ranges, owners, before.gather(0, owners[None])[0].tolist())

    def __len__(self) -> int:
        return len(self.ranges)

    @cached_property
    def by_rank(self) -> dict[int, list[int]]:
        """The numbers of each rank's chunks, ascending."""
        found: dict[int, list[int]] = {}
        for number, owner in enumerate(self.owners.tolist()):
            found.setdefault(owner, []).append(number)
        return found

    def held_by(self, rank: int) -> list[int]:
        """The numbers of a rank's chunks, ascending."""
        return self.by_rank.get(rank, [])

    def local(self, number: int) -> range:
        """A chunk's local indices on its rank."""
        return range(self.starts[number], self.starts[number] + len(self.ranges[number]))


def seen(geometry: Geometry, queries: Chunks, keys: Chunks) -> Tensor:
    """Whether any query of a chunk sees any key of another chunk: bool ``[N, M]``."""
    marks = torch.zeros(len(queries), len(keys) + 1, dtype=torch.int32)
    starts = torch.tensor(_ends(keys.ranges)[0], dtype=torch.int64)
    for rank in range(geometry.world_size):
        own = queries.held_by(rank)
        lengths = torch.tensor([len(queries.ranges[n]) for n in own], dtype=torch.int64)
        chunk = torch.tensor(own, dtype=torch.int64).repeat_interleave(lengths)
        for lo, hi in geometry.parts(rank):
            some = hi > lo
            first = torch.searchsorted(starts, lo[some], right=True) - 1
            after = torch.searchsorted(starts, hi[some] - 1, right=True)
            one = torch.ones(len(first), dtype=torch.int32)
            marks.index_put_((chunk[some], first), one, accumulate=True)
            marks.index_put_((chunk[some], after), -one, accumulate=True)
    return marks.cumsum(1)[:, :-1] > 0


def wanted(sees: Tensor, owners: Tensor, ranks: int) -> list[list[int]]:
    """For each rank, the columns that any of its rows sees. owners: the rank of each row."""
    return [sees[owners == rank].any(0).nonzero().flatten().tolist() for rank in range(ranks)]


def joined(ranges: Iterable[range]) -> Ranges:
    """Ascending ranges, joined where they touch."""
    found: list[range] = []
    for r in ranges:
        if found and found[-1].stop == r.start:
            found[-1] = range(found[-1].start, r.stop)
        else:
            found.append(r)
    return tuple(found)


def _ends(ranges: Ranges) -> tuple[list[int], list[int]]:
    return [r.start for r in ranges], [r.stop for r in ranges]
