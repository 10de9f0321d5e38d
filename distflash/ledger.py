"""Ledgers: which rank stores which keys of a cached sequence (a block table), known to every rank without
communication.

A ledger is immutable. Its methods return other ledgers, and the same object for the same arguments while it is alive.
So the layers of a model and equal sequences of a batch share ledgers, and the plans made for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distflash.cache_balance import rebalance, storing_ranks
from distflash.exact import ByIdentity
from distflash.geometry import Tokens
from distflash.layouts import Layout


@dataclass(frozen=True, eq=False)
class Move:
    """Keys of a chunk that another rank stores than the one whose shard they are in.

    Attributes:
        sender, receiver: the ranks.
        positions: int32, ascending.
    """

    sender: int
    receiver: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Ledger(Tokens):
    """The keys of one sequence.

    Attributes:
        held: by ranks, int32 on the CPU: the positions of the keys that a rank stores, ascending.
        total: the length of the sequence in tokens, of which some keys may have been dropped.
        moves: the keys of the last chunk that were sent to another rank.
    """

    held: tuple[Tensor, ...]
    total: int
    moves: tuple[Move, ...] = ()
    _next: WeakValueDictionary[Hashable, Ledger] = field(default_factory=WeakValueDictionary, init=False, repr=False)

    @staticmethod
    def empty(world_size: int) -> Ledger:
        """The ledger of an empty sequence."""
        return Ledger((torch.empty(0, dtype=torch.int32),) * world_size, 0)

    @property
    def world_size(self) -> int:
        return len(self.held)

    @cached_property
    def counts(self) -> list[int]:
        """How many keys each rank stores."""
        return [len(positions) for positions in self.held]

    def length(self, rank: int) -> int:
        return len(self.held[rank])

    def positions(self, rank: int) -> Tensor:
        """int32 ``[length]``."""
        return self.held[rank]

    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        return torch.searchsorted(self.held[rank], positions.int().contiguous()).long()

    def with_chunk(self, layout: Layout, tokens: int) -> Ledger:
        """With ``tokens`` more, sharded by ``layout``. Some move to other ranks: see `rebalance`."""
        # Keyed by the object, since a layout of the user's own may not be hashable.
        return self._then((ByIdentity(layout), tokens), lambda: self._with_chunk(layout, tokens))

    def with_step(self, tokens: int) -> Ledger:
        """With ``tokens`` more that all ranks have; each is stored on one rank: see `storing_ranks`."""
        return self._then(("step", tokens), lambda: self._with_step(tokens)) if tokens else self

    def truncated(self, total: int) -> Ledger:
        """With the first ``total`` tokens only."""
        if total == self.total:
            return self
        return self._then(("first", total), lambda: Ledger(tuple(h[: _below(h, total)] for h in self.held), total))

    def keeping(self, ranges: tuple[range, ...]) -> Ledger:
        """With only the keys at positions in these ascending ranges; the length stays."""
        return self._then(("keeping", ranges), lambda: Ledger(tuple(_within(h, ranges) for h in self.held), self.total))

    def _then(self, key: Hashable, made: Callable[[], Ledger]) -> Ledger:
        after = self._next.get(key)
        if after is None:
            self._next[key] = after = made()
        return after

    def _with_chunk(self, layout: Layout, tokens: int) -> Ledger:
        ranks = range(self.world_size)
        brought = [(layout.positions(tokens, len(ranks), rank) + self.total).int() for rank in ranks]
        gives = rebalance(self.counts, list(map(len, brought)))
        stays = [own[: len(own) - max(0, given)] for own, given in zip(brought, gives, strict=True)]
        moves = _moves([own[len(own) - max(0, given) :] for own, given in zip(brought, gives, strict=True)], gives)
        taken = [[move.positions for move in moves if move.receiver == rank] for rank in ranks]
        new = [torch.cat([s, *t]).sort().values if t else s for s, t in zip(stays, taken, strict=True)]
        return Ledger(tuple(map(_cat, self.held, new)), self.total + tokens, moves)

    def _with_step(self, tokens: int) -> Ledger:
        keeper = storing_ranks(torch.tensor([self.counts]), tokens)[0]
        positions = torch.arange(self.total, self.total + tokens, dtype=torch.int32)
        new = [positions[keeper == rank] for rank in range(self.world_size)]
        return Ledger(tuple(map(_cat, self.held, new)), self.total + tokens)


def _moves(given: Sequence[Tensor], gives: Sequence[int]) -> tuple[Move, ...]:
    """The moves from ranks with too many keys to ranks with too few, both in ascending order."""
    moves = []
    giver, done = 0, 0
    for receiver, wants in enumerate(-min(0, n) for n in gives):
        while wants:
            piece = given[giver][done : done + wants]
            if len(piece):
                moves.append(Move(giver, receiver, piece))
            wants, done = wants - len(piece), done + len(piece)
            if done == len(given[giver]):
                giver, done = giver + 1, 0
    return tuple(moves)


def _cat(before: Tensor, new: Tensor) -> Tensor:
    return torch.cat([before, new]) if len(new) else before


def _below(held: Tensor, position: int) -> int:
    return int(torch.searchsorted(held, position))


def _within(held: Tensor, some: tuple[range, ...]) -> Tensor:
    return torch.cat([held[_below(held, r.start) : _below(held, r.stop)] for r in some]) if some else held[:0]
