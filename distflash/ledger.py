"""Which rank keeps which keys of a sequence that grows: known on every rank, without asking any other.

A ledger is a value. What is done to it gives another one, and doing the same to the same ledger gives the same object
as long as anybody has it: the layers of a model, and the sequences of a batch, share what they have in common, and the
plans made for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distflash.dealing import keepers, level
from distflash.exact import Same
from distflash.geometry import Tokens
from distflash.layouts import Layout


@dataclass(frozen=True, eq=False)
class Move:
    """Keys of a chunk that one rank brings and another one keeps.

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
        held: by ranks, int32 on the CPU: the positions of the keys that a rank keeps, ascending.
        total: how many tokens the sequence has had. Some of their keys may be kept no longer.
        moves: how the last chunk's keys came to where they are, where they are not kept by who brought them.
    """

    held: tuple[Tensor, ...]
    total: int
    moves: tuple[Move, ...] = ()
    _next: WeakValueDictionary[Hashable, Ledger] = field(default_factory=WeakValueDictionary, init=False, repr=False)

    @staticmethod
    def empty(world_size: int) -> Ledger:
        """Of a sequence without tokens."""
        return Ledger((torch.empty(0, dtype=torch.int32),) * world_size, 0)

    @property
    def world_size(self) -> int:
        return len(self.held)

    @cached_property
    def counts(self) -> list[int]:
        """How many keys each rank keeps."""
        return [len(positions) for positions in self.held]

    def length(self, rank: int) -> int:
        return len(self.held[rank])

    def positions(self, rank: int) -> Tensor:
        """int32 ``[length]``."""
        return self.held[rank]

    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        return torch.searchsorted(self.held[rank], positions.int().contiguous()).long()

    def with_chunk(self, layout: Layout, tokens: int) -> Ledger:
        """``tokens`` more, which the ranks bring as ``layout`` spreads them. Some are kept elsewhere, see `level`."""
        # By the object: a layout of the user's own may not be hashable.
        return self._then((Same(layout), tokens), lambda: self._with_chunk(layout, tokens))

    def with_dealt(self, tokens: int) -> Ledger:
        """``tokens`` more that all ranks have, each kept by one of them: see `keepers`."""
        return self._then(("dealt", tokens), lambda: self._with_dealt(tokens)) if tokens else self

    def truncated(self, total: int) -> Ledger:
        """The first ``total`` tokens alone."""
        if total == self.total:
            return self
        return self._then(("first", total), lambda: Ledger(tuple(h[: _below(h, total)] for h in self.held), total))

    def keeping(self, some: tuple[range, ...]) -> Ledger:
        """The same tokens, but only those keys kept that are at positions of ascending ranges."""
        return self._then(("keeping", some), lambda: Ledger(tuple(_within(h, some) for h in self.held), self.total))

    def _then(self, key: Hashable, made: Callable[[], Ledger]) -> Ledger:
        after = self._next.get(key)
        if after is None:
            self._next[key] = after = made()
        return after

    def _with_chunk(self, layout: Layout, tokens: int) -> Ledger:
        ranks = range(self.world_size)
        brought = [(layout.positions(tokens, len(ranks), rank) + self.total).int() for rank in ranks]
        gives = level(self.counts, list(map(len, brought)))
        stays = [own[: len(own) - max(0, given)] for own, given in zip(brought, gives, strict=True)]
        moves = _moves([own[len(own) - max(0, given) :] for own, given in zip(brought, gives, strict=True)], gives)
        taken = [[move.positions for move in moves if move.receiver == rank] for rank in ranks]
        new = [torch.cat([s, *t]).sort().values if t else s for s, t in zip(stays, taken, strict=True)]
        return Ledger(tuple(map(_cat, self.held, new)), self.total + tokens, moves)

    def _with_dealt(self, tokens: int) -> Ledger:
        keeper = keepers(torch.tensor([self.counts]), tokens)[0]
        positions = torch.arange(self.total, self.total + tokens, dtype=torch.int32)
        new = [positions[keeper == rank] for rank in range(self.world_size)]
        return Ledger(tuple(map(_cat, self.held, new)), self.total + tokens)


def _moves(given: Sequence[Tensor], gives: Sequence[int]) -> tuple[Move, ...]:
    """What ranks give, in the order of ranks, to those that take, in the same order."""
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
