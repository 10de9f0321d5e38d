"""The rows that a gathered layer runs on: whole documents, or this rank's tokens with a halo.

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
    """Rows of one call of a layer. rows: of the fetched rows. start: the first one's index in its document."""

    rows: range
    start: int


class Reach(ABC):
    """How far back a layer reads."""

    @abstractmethod
    def fetch(self, x: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
        """Fetch the rows ``[B, R, ...]`` to run on; ``x [B, T, ...]`` are this rank's."""

    @abstractmethod
    def pieces(self, shard: Shard) -> tuple[Piece, ...]:
        """The calls of the layer."""

    @abstractmethod
    def kept(self, shard: Shard) -> Tensor:
        """int64 ``[T]``: the indices of this rank's tokens in the concatenated pieces."""


@dataclass(frozen=True)
class Everything(Reach):
    """For layers that read all of a document. Documents without a local token are not run."""

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
    """For layers that read ``left`` previous tokens: a convolution with ``left + 1`` taps, or a shift by one."""

    left: int

    def fetch(self, x: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
        return cp.halo(x, self.left, 1, shard.documents, shard.seq_len)[0]

    def pieces(self, shard: Shard) -> tuple[Piece, ...]:
        """Runs of consecutive tokens with their halo. At the start of a document the layer does its own padding.

        So the halo's rows of zeros are left out.
        """
        pieces = []
        for number, run in enumerate(_runs(shard)):
            before = min(self.left, run.place)
            first = run.first + (number + 1) * self.left
            pieces.append(Piece(range(first - before, first + run.length), run.place - before))
        return tuple(pieces)

    def kept(self, shard: Shard) -> Tensor:
        """The last rows of each piece, after the halo."""
        runs, pieces = _runs(shard), self.pieces(shard)
        ends = torch.tensor([len(piece.rows) for piece in pieces]).cumsum(0).tolist()
        return torch.cat([torch.arange(end - run.length, end) for run, end in zip(runs, ends, strict=True)])


def reach(left: int | None, shard: Shard) -> Reach:
    """The reach of a layer that reads ``left`` previous tokens (None: all). The same on all ranks.

    If halos would have more rows than the sequence (`Striped`), everything is gathered.
    """
    if (
        left is None
        or left * _most_runs(shard.layout, shard.seq_len, shard.world_size) * shard.world_size >= shard.seq_len
    ):
        return Everything()
    return Before(left)


@dataclass(frozen=True)
class _Run:
    """Consecutive tokens of one document. first: a local index. place: the first token's index in its document."""

    first: int
    length: int
    place: int


def _runs(shard: Shard) -> list[_Run]:
    """This rank's runs, ascending."""
    positions, ends = _positions(shard), torch.tensor(_ends(shard))
    starts = ends[torch.searchsorted(ends, positions, right=True) - 1]
    begins = (positions.diff(prepend=positions[:1] - 2) != 1) | (positions == starts)
    bounds = [*begins.nonzero()[:, 0].tolist(), len(positions)]
    return [_Run(a, b - a, int(positions[a] - starts[a])) for a, b in pairwise(bounds)]


@lru_cache(8)
def _most_runs(layout: Layout, seq_len: int, world_size: int) -> int:
    """The most runs of any rank, for one document."""
    held = [layout.positions(seq_len, world_size, rank) for rank in range(world_size)]
    return max(int((positions.diff() != 1).sum()) + 1 for positions in held)


def _ends(shard: Shard) -> Sequence[int]:
    return (0, shard.seq_len) if shard.documents is None else shard.documents.cu_seqlens


def _positions(shard: Shard) -> Tensor:
    return shard.layout.positions(shard.seq_len, shard.world_size, shard.rank)


def _places(positions: Tensor, ranges: Sequence[range]) -> Tensor:
    """The index of each position in the concatenated ranges."""
    starts = torch.tensor([each.start for each in ranges])
    lengths = torch.tensor([len(each) for each in ranges])
    nth = torch.searchsorted(starts, positions, right=True) - 1
    return positions - starts[nth] + (lengths.cumsum(0) - lengths)[nth]
