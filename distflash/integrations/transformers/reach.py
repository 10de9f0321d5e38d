"""Which rows of the sequence a layer is run on: all of each document, or this rank's with some before them.

[Note: shapes] B batch, T local tokens, S global tokens, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from distflash.context import ContextParallel
from distflash.integrations.transformers.batch import Shard
from distflash.layouts import Layout


@dataclass(frozen=True)
class Piece:
    """Rows that are run by themselves. rows: which of those fetched. start: the first one's place in its document."""

    rows: range
    start: int


class Reach(ABC):
    """How far back a layer reads."""

    @abstractmethod
    def fetch(self, x: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
        """Of this rank's ``x [B, T, ...]`` and the other ranks' ones, the rows ``[B, R, ...]`` that it is run on."""

    @abstractmethod
    def pieces(self, shard: Shard) -> tuple[Piece, ...]:
        """What is run, one after the other."""

    @abstractmethod
    def kept(self, shard: Shard) -> Tensor:
        """int64 ``[T]``: where this rank's tokens are in the pieces end to end."""


@dataclass(frozen=True)
class Everything(Reach):
    """A layer that reads all of a document. Documents that this rank has no token of are not run."""

    def fetch(self, x: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
        return cp.gather(x, 1, shard.seq_len)

    def pieces(self, shard: Shard) -> tuple[Piece, ...]:
        ends = _ends(shard)
        below = shard.layout.count_below(torch.tensor(ends), shard.seq_len, shard.world_size, shard.rank).tolist()
        documents = [range(*each) for each, (a, b) in zip(pairwise(ends), pairwise(below), strict=True) if b > a]
        return tuple(Piece(document, 0) for document in documents)

    def kept(self, shard: Shard) -> Tensor:
        return _places(_positions(shard), [piece.rows for piece in self.pieces(shard)])


@dataclass(frozen=True)
class Before(Reach):
    """A layer that reads ``left`` tokens before each: a convolution of ``left + 1`` taps, or a shift by one."""

    left: int

    def fetch(self, x: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
        return cp.halo(x, self.left, 1, shard.documents, shard.seq_len)[0]

    def pieces(self, shard: Shard) -> tuple[Piece, ...]:
        """Runs of consecutive tokens, with the tokens of their document before them, but without rows of zeros.

        A layer lays its own zeros before a document, which need not be what it makes of rows of zeros.
        """
        pieces = []
        for number, run in enumerate(_runs(shard)):
            before = min(self.left, run.place)
            first = run.first + (number + 1) * self.left
            pieces.append(Piece(range(first - before, first + run.length), run.place - before))
        return tuple(pieces)

    def kept(self, shard: Shard) -> Tensor:
        """The last rows of each piece; those before them were fetched."""
        runs, pieces = _runs(shard), self.pieces(shard)
        ends = torch.tensor([len(piece.rows) for piece in pieces]).cumsum(0).tolist()
        return torch.cat([torch.arange(end - run.length, end) for run, end in zip(runs, ends, strict=True)])


def reach(left: int | None, shard: Shard) -> Reach:
    """The reach of a layer that reads ``left`` tokens before each, None for all; alike on all ranks.

    Where that would be more rows than it has tokens (`Striped`), all are gathered.
    """
    if (
        left is None
        or left * _most_runs(shard.layout, shard.seq_len, shard.world_size) * shard.world_size >= shard.seq_len
    ):
        return Everything()
    return Before(left)


@dataclass(frozen=True)
class _Run:
    """Consecutive tokens of one document. first: among this rank's ones. place: the first one's in its document."""

    first: int
    length: int
    place: int


def _runs(shard: Shard) -> list[_Run]:
    """This rank's, in ascending order."""
    positions, ends = _positions(shard), torch.tensor(_ends(shard))
    starts = ends[torch.searchsorted(ends, positions, right=True) - 1]
    begins = (positions.diff(prepend=positions[:1] - 2) != 1) | (positions == starts)
    bounds = [*begins.nonzero()[:, 0].tolist(), len(positions)]
    return [_Run(a, b - a, int(positions[a] - starts[a])) for a, b in pairwise(bounds)]


@lru_cache(8)
def _most_runs(layout: Layout, seq_len: int, world_size: int) -> int:
    """Of any rank, in one document."""
    held = [layout.positions(seq_len, world_size, rank) for rank in range(world_size)]
    return max(int((positions.diff() != 1).sum()) + 1 for positions in held)


def _ends(shard: Shard) -> Sequence[int]:
    return (0, shard.seq_len) if shard.documents is None else shard.documents.cu_seqlens


def _positions(shard: Shard) -> Tensor:
    return shard.layout.positions(shard.seq_len, shard.world_size, shard.rank)


def _places(positions: Tensor, ranges: Sequence[range]) -> Tensor:
    """Where each position is in the ranges, end to end."""
    starts = torch.tensor([each.start for each in ranges])
    lengths = torch.tensor([len(each) for each in ranges])
    nth = torch.searchsorted(starts, positions, right=True) - 1
    return positions - starts[nth] + (lengths.cumsum(0) - lengths)[nth]
