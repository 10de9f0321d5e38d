"""The geometry of a call: a mask, and which queries and keys each rank holds.

In self-attention both are the same tokens. There are `Tokens` for shards and chunks of a sequence, for the concatenated
sequences of a batch, and for groups of ranks that gather their tokens. Modules above this one do not distinguish them.

[Note: shapes] S sequence length, T local queries, K local keys, W ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

import torch
from torch import Tensor

from distflash.layouts import Layout
from distflash.mask_algebra import Ends, Mask, wrapped
from distflash.visible import Runs, joined, seen, without_gaps

# The largest number of intervals of a union: each costs a pass over all queries.
MOST_PARTS = 16


class Tokens(ABC):
    """Which tokens of a sequence each rank holds, in ascending order."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """How many ranks share the tokens."""

    @abstractmethod
    def length(self, rank: int) -> int:
        """How many tokens ``rank`` holds."""

    @abstractmethod
    def positions(self, rank: int) -> Tensor:
        """int64 ``[length]`` on the CPU: the global positions of the rank's tokens, ascending."""

    @abstractmethod
    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        """How many of the rank's tokens lie before each global position: int64, of the same shape."""

    def chunks(self, size: int) -> tuple[range, ...]:
        """All ranks' tokens in chunks of ``size`` positions; the last one of a sequence may be shorter.

        Raises:
            ValueError: by default; these tokens cannot be cut.
        """
        raise ValueError(f"{type(self).__name__}: these tokens are not cut into chunks")

    def require_cover(self) -> None:  # noqa: B027  (only layouts of users are checked)
        """Raise a ValueError if the layout, which may be the user's, loses a token or gives it to two ranks."""


@dataclass(frozen=True)
class Sharded(Tokens):
    """``total`` tokens from position ``start`` on, sharded over the ranks by a layout."""

    layout: Layout
    total: int
    ranks: int
    start: int = 0

    @property
    def world_size(self) -> int:
        return self.ranks

    def length(self, rank: int) -> int:
        return self.layout.length(self.total, self.ranks, rank)

    def positions(self, rank: int) -> Tensor:
        positions = self.layout.positions(self.total, self.ranks, rank)
        return positions + self.start if self.start else positions

    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        return self.layout.count_below(positions - self.start, self.total, self.ranks, rank)

    def chunks(self, size: int) -> tuple[range, ...]:
        stop = self.start + self.total
        return tuple(range(first, min(first + size, stop)) for first in range(self.start, stop, size))

    def require_cover(self) -> None:
        held = [[r for r in self.layout.ranges(self.total, self.ranks, rank) if len(r)] for rank in range(self.ranks)]
        ascend = all(r.step > 0 for ranges in held for r in ranges) and all(
            before[-1] < after[0] for ranges in held for before, after in pairwise(ranges)
        )
        total = self.total
        covers = sum(map(len, chain(*held))) == total and sum(map(_sum, chain(*held))) == total * (total - 1) // 2
        if not (ascend and covers):
            raise ValueError(
                f"layout: {self.layout!r}.ranges gives the {self.ranks} ranks {held} of seq_len={total}; expected "
                f"ascending ranges that hold each of the {total} positions once"
            )


@dataclass(frozen=True)
class Together(Tokens):
    """Groups of ranks that gather their tokens. Rank n stands for the group ``members[n]``."""

    tokens: Tokens
    members: tuple[tuple[int, ...], ...]

    @property
    def world_size(self) -> int:
        return len(self.members)

    def length(self, rank: int) -> int:
        return sum(self.tokens.length(member) for member in self.members[rank])

    def positions(self, rank: int) -> Tensor:
        return torch.cat([self.tokens.positions(member) for member in self.members[rank]]).sort().values

    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        return torch.stack([self.tokens.count_below(positions, member) for member in self.members[rank]]).sum(0)

    def require_cover(self) -> None:
        self.tokens.require_cover()


@dataclass(frozen=True)
class Folded(Tokens):
    """``rows`` concatenated sequences of ``seq_len`` positions: row r's token at p is at ``r * seq_len + p``."""

    tokens: Tokens
    seq_len: int
    rows: int

    @property
    def world_size(self) -> int:
        return self.tokens.world_size

    def length(self, rank: int) -> int:
        return self.rows * self.tokens.length(rank)

    def positions(self, rank: int) -> Tensor:
        starts = torch.arange(self.rows) * self.seq_len
        return (starts[:, None] + self.tokens.positions(rank)).flatten()

    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        row = torch.div(positions, max(1, self.seq_len), rounding_mode="floor").clamp_(0, max(0, self.rows - 1))
        within = self.tokens.count_below(positions - row * self.seq_len, rank)
        return row * self.tokens.length(rank) + within

    def chunks(self, size: int) -> tuple[range, ...]:
        starts = [row * self.seq_len for row in range(self.rows)]
        return tuple(range(at + r.start, at + r.stop) for at in starts for r in self.tokens.chunks(size))

    def require_cover(self) -> None:
        self.tokens.require_cover()


@dataclass(frozen=True)
class Geometry:
    """Queries and keys of a call under its mask.

    Attributes:
        mask: over global positions.
        queries: the query tokens of each rank.
        keys: the key tokens of each rank; as many ranks.
        seq_len: the length passed to the mask; positions of keys are below it.
        for_backward: whether to compute column intervals, which only the backward needs.
        distances: whether to keep the positions of keys, for ALiBi.
    """

    mask: Mask
    queries: Tokens
    keys: Tokens
    seq_len: int
    for_backward: bool = True
    distances: bool = True
    _parts: dict[int, tuple[Ends, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of_sequence(mask: Mask, layout: Layout, seq_len: int, world_size: int) -> Geometry:
        """Self-attention over one sequence."""
        tokens = Sharded(layout, seq_len, world_size)
        return Geometry(mask, tokens, tokens, seq_len)

    @property
    def world_size(self) -> int:
        return self.keys.world_size

    @cached_property
    def needs(self) -> Needs:
        """What each rank's queries see of each rank's keys; see `Needs.of`."""
        return Needs.of(self)

    def parts(self, rank: int) -> tuple[Ends, ...]:
        """The bounds ``(lo, hi)`` of the rank's queries, global positions, int64 ``[T]``: one pair per part of the
        mask.

        Most masks have one part; a union has several, see `Mask.parts`. Cached, since a plan needs them for each
        source.

        Raises:
            ValueError: the bounds violate the contract of `Mask.ends`, or there are more than MOST_PARTS parts.
        """
        if rank not in self._parts:
            self._parts[rank] = self._parts_of(rank)
        return self._parts[rank]

    def _parts_of(self, rank: int) -> tuple[Ends, ...]:
        positions = self.queries.positions(rank)
        parts = self.mask.parts(positions, self.seq_len)
        if len(parts) > MOST_PARTS:
            raise ValueError(
                f"mask: {self.mask!r} gives the queries of rank {rank} {len(parts)} intervals of keys that cannot be "
                f"joined; expected at most {MOST_PARTS}, since each is a pass of the kernel over the queries. Use a "
                "mask of fewer parts, or one that allows more pairs"
            )
        for lo, hi in parts:
            require_ends(self.mask, positions, lo, hi)
        return tuple((lo.clamp(0, self.seq_len), hi.clamp(0, self.seq_len)) for lo, hi in parts)

    def local(self, ends: Ends, source: int) -> Ends:
        """Convert global bounds to the source's local key indices. An empty interval has ``hi == lo``."""
        lo, hi = (self.keys.count_below(end, source) for end in ends)
        return lo, torch.maximum(lo, hi)


@dataclass(frozen=True)
class Needs:
    """Which keys of each source each rank's queries see. Every rank computes it for all ranks, without communication.

    Attributes:
        pairs: int64 ``[W, W]``: allowed (query, key) pairs of each rank (row) with each source (column).
        rows: ``rows[rank][source]``: the source's local keys that the rank's queries see, as ascending ranges; empty if
            they see none.
    """

    pairs: Tensor
    rows: tuple[tuple[tuple[range, ...], ...], ...]

    @staticmethod
    def of(geometry: Geometry) -> Needs:
        """The needs of all ranks.

        Raises:
            ValueError: the layout or the mask, which may be the user's own, violates its contract.
        """
        for tokens in {id(t): t for t in (geometry.queries, geometry.keys)}.values():
            tokens.require_cover()
        ranks = range(geometry.world_size)
        parts = [geometry.parts(rank) for rank in ranks]
        ranges = [seen(of_rank) for of_rank in parts]
        every = [(run.start, run.stop, rank) for rank in ranks for run in ranges[rank]]
        runs = torch.tensor(every, dtype=torch.int64).view(-1, 3).unbind(1)
        table = [_of_source(geometry.keys, source, *runs) for source in ranks]
        rows = tuple(tuple(table[source][rank] for source in ranks) for rank in ranks)
        held = Runs.of([geometry.keys.positions(source) for source in ranks])
        return Needs(torch.stack([held.pairs(of_rank) for of_rank in parts]), rows)

    @property
    def remote(self) -> tuple[int, ...]:
        """For each rank, how many remote keys it receives: those that it sees, and small gaps between them."""
        return tuple(
            sum(sum(map(len, runs)) for source, runs in enumerate(row) if source != rank)
            for rank, row in enumerate(self.rows)
        )

    def any_pair(self, rank: int, source: int) -> bool:
        return bool(self.rows[rank][source])


def _of_source(keys: Tokens, source: int, starts: Tensor, stops: Tensor, readers: Tensor) -> list[tuple[range, ...]]:
    """For each rank, the local indices of one source's keys that it sees.

    Args:
        starts, stops: the ranges of positions that ranks see, ascending for each rank.
        readers: the rank of each of them.
    """
    found: list[list[range]] = [[] for _ in range(keys.world_size)]
    local = joined(keys.count_below(starts, source), keys.count_below(stops, source), readers)
    for start, stop, reader in zip(*local, strict=True):
        found[reader].append(range(start, stop))
    return [without_gaps(runs) if runs else () for runs in found]


def _sum(r: range) -> int:
    return len(r) * (r[0] + r[-1]) // 2


def require_ends(mask: Mask, positions: Tensor, lo: Tensor, hi: Tensor) -> None:
    """Raise a ValueError if bounds, which may come from a user's mask, would silently omit keys."""
    for name, end in (("lo", lo), ("hi", hi)):
        if end.shape != positions.shape or end.dtype != torch.int64:
            raise ValueError(
                f"mask: {mask!r}.ends returned {name} as {end.dtype} {list(end.shape)}; expected int64 "
                f"{list(positions.shape)}, one number per query"
            )
        falls = (end.diff() < 0).nonzero()
        if len(falls):
            n = int(falls[0])
            raise ValueError(
                f"mask: {mask!r}.ends returned {name} = {int(end[n])} for the query at {int(positions[n])} and "
                f"{int(end[n + 1])} for that at {int(positions[n + 1])}; expected numbers that never decrease"
            )
    if wrapped(lo, hi):
        raise ValueError(
            f"mask: {mask!r}.ends returned {int(lo[-1])} <= key < {int(hi[0])}, which has wrapped around at int64's "
            "limits; clamp large numbers before adding them to positions, and give an empty interval as lo = hi"
        )
