"""Reproducible: the same bits on any number of ranks, since kernel calls do not depend on it.

The sequence is cut into chunks at multiples of ``chunk``. A kernel call is of a chunk of queries and all keys that they
see; for dK and dV, of a chunk of keys and all queries that see them. Tokens are in the order of positions. So shapes,
values and order of a call depend on the mask, the length and the chunk only. The layout decides which rank makes it.

Nothing is summed over ranks. A rank receives all keys that its queries see, and in backward also all queries that see
its keys. Backward computes each (query, key) pair twice: for dQ on the query's rank, for dK and dV on the key's rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from distflash.chunkwise_plan import ChunkwisePlan, GatheredChunks, Piece
from distflash.geometry import Geometry
from distflash.integers import set_count
from distflash.intervals import build
from distflash.pieces import Chunks, Gathered, Ranges, joined, seen, wanted
from distflash.plan import Gradients, Pass, Stage, What
from distflash.schedules.base import Schedule
from distflash.schedules.moves import Move, transfers


@dataclass(frozen=True)
class Reproducible(Schedule):
    """The same bits on 1, 2, 4 or any number of ranks: the output, lse, dQ, dK, dV and the gradient of sinks.

    For debugging: whether two runs on different numbers of ranks differ by rounding or by a bug. It is slower than
    `Ring` and needs more memory: a rank holds all keys that its queries see (in backward also all queries that see its
    keys), and communication does not overlap with compute. See `docs/numerics.md`.

    No chunk may be on two ranks: use `WholeChunks`, or `Zigzag` or `Contiguous` with a length that they cut at
    multiples of the chunk. All ranks need the same kernel and kind of device; on Hopper GPUs the default is
    ``df.kernels.Hopper(deterministic=True)``. On CPUs all runs need the same ``torch.get_num_threads()`` (torchrun sets
    1 if there are several processes).

    Args:
        chunk: tokens per chunk. Larger chunks are faster, smaller ones are balanced better.

    Raises:
        ValueError: chunk is no int of at least 1.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, df.WholeChunks(df.Zigzag(), 16), df.Reproducible(16))
        >>> q, k, v = (cp.shard(torch.randn(1, 100, heads, 32)) for heads in (4, 2, 2))
        >>> df.attention(q, k, v, mask=df.Causal(), cp=cp, seq_len=100).shape
        torch.Size([1, 36, 4, 32])
    """

    chunk: int = 512

    reproducible: ClassVar[bool] = True

    def __post_init__(self) -> None:
        set_count(self, "chunk", least=1)

    def plan(self, geometry: Geometry, rank: int) -> ChunkwisePlan:
        return _Cut.of(geometry, self.chunk).plan(rank)


@dataclass(frozen=True, eq=False)
class _Cut:
    """A call cut into chunks; the same on all ranks.

    Attributes:
        sees: for each chunk of queries, the chunks of keys that it sees.
        seen_by: for each chunk of keys, the chunks of queries that see it.
        keys_at, queries_at: for each rank, the chunks that its kernel calls read.
    """

    geometry: Geometry
    queries: Chunks
    keys: Chunks
    sees: list[list[int]]
    seen_by: list[list[int]]
    keys_at: list[list[int]]
    queries_at: list[list[int]]

    @staticmethod
    def of(geometry: Geometry, size: int) -> _Cut:
        for tokens in (geometry.queries, geometry.keys):
            tokens.require_cover()
        queries = Chunks.of(geometry.queries, size)
        keys = queries if geometry.keys is geometry.queries else Chunks.of(geometry.keys, size)
        sees, W = seen(geometry, queries, keys), geometry.world_size
        return _Cut(
            geometry,
            queries,
            keys,
            [row.nonzero().flatten().tolist() for row in sees],
            [column.nonzero().flatten().tolist() for column in sees.T],
            wanted(sees, queries.owners, W),
            wanted(sees.T, keys.owners, W),
        )

    def plan(self, rank: int) -> ChunkwisePlan:
        geometry, needs = self.geometry, self.geometry.needs
        keys = [*_moves(What.KEYS, self.keys, self.keys_at)]
        queries = [*_moves(What.QUERIES, self.queries, self.queries_at)]
        of_queries, of_keys = self.queries.held_by(rank), self.keys.held_by(rank)
        forward = [each for n in of_queries for each in self._over_keys(n)]
        backward = [replace(each, gradients=Gradients.OF_QUERIES) for each in forward]
        backward += [replace(each, gradients=Gradients.OF_KEYS) for n in of_keys for each in self._under_queries(n)]
        gathered_keys = GatheredChunks.of(self.keys, self.keys_at[rank], rank)
        gathered_queries = GatheredChunks.of(self.queries, self.queries_at[rank], rank)
        return ChunkwisePlan(
            rank=rank,
            forward=_stages(keys, rank, forward),
            backward=_stages(keys + queries, rank, backward),
            lengths=tuple(geometry.keys.length(r) for r in range(geometry.world_size)),
            rows={r: _local(self.keys, self.keys_at[rank], r) for r in gathered_keys.ranks if r != rank},
            pairs=needs.pairs,
            remote=needs.remote,
            of_queries=_pieces(self.queries, of_queries, self.sees, gathered_keys),
            of_keys=_pieces(self.keys, of_keys, self.seen_by, gathered_queries),
            keys=gathered_keys,
            queries=gathered_queries,
            owners=tuple(self.queries.owners.tolist()),
        )

    def _over_keys(self, number: int) -> list[Pass]:
        """A chunk of queries over all keys that it sees."""
        keys = joined(self.keys.ranges[n] for n in self.sees[number])
        return self._passes(number, (self.queries.ranges[number],), keys)

    def _under_queries(self, number: int) -> list[Pass]:
        """All queries that see a chunk of keys, over it."""
        queries = joined(self.queries.ranges[n] for n in self.seen_by[number])
        return self._passes(number, queries, (self.keys.ranges[number],))

    def _passes(self, number: int, queries: Ranges, keys: Ranges) -> list[Pass]:
        """One for each part of the mask; none if there is no pair."""
        if not queries or not keys:
            return []
        tokens = Gathered(queries), Gathered(keys)
        parts = build(Geometry(self.geometry.mask, *tokens, self.geometry.seq_len), 0, 0)
        last = len(parts) - 1
        return [
            Pass(number, (number,), (part,), first=n == 0, last=n == last, adds=n > 0) for n, part in enumerate(parts)
        ]


def _pieces(chunks: Chunks, numbers: list[int], beside: list[list[int]], gathered: GatheredChunks) -> tuple[Piece, ...]:
    return tuple(Piece(n, chunks.local(n), joined(gathered.ranges[m] for m in beside[n])) for n in numbers)


def _local(chunks: Chunks, numbers: list[int], rank: int) -> Ranges:
    """The local indices of ``rank``'s tokens in these chunks."""
    asked = set(numbers)
    return joined(chunks.local(n) for n in chunks.held_by(rank) if n in asked)


def _moves(what: What, chunks: Chunks, wanted_by: list[list[int]]) -> Iterator[Move]:
    """Each rank receives what its kernel calls read, directly from the ranks that hold it."""
    for receiver, numbers in enumerate(wanted_by):
        for sender in range(len(wanted_by)):
            rows = () if sender == receiver else _local(chunks, numbers, sender)
            if rows:
                yield Move(what, 0, 1, sender, receiver, sender, sum(map(len, rows)), rows)


def _stages(moves: Sequence[Move], rank: int, passes: Sequence[Pass]) -> tuple[Stage, ...]:
    """One stage that receives everything, if anything is sent, and one that computes."""
    arriving = (Stage(transfers(moves, rank, 0)),) if moves else ()
    return *arriving, Stage(passes=tuple(passes))
