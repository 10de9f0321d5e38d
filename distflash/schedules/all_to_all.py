"""The all-to-all of `Ulysses`, as a placement: from some tokens of all heads to all tokens of some heads.

[Note: shapes] Queries and keys are ``[B, T, heads, dim]``, numbers of a query and head ``[B, heads, T]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distflash.geometry import Tokens
from distflash.placement import Held, Placement, Sizes
from distflash.schedules.base import Asked
from distflash.schedules.heads import HeadShare
from distflash.transport import Message, Transport


@dataclass(frozen=True)
class AllToAll(Placement):
    """The all-to-all of one call within the groups of ranks that exchange heads.

    Attributes:
        transport: of all ranks.
        groups: the ranks of each group.
        share: which heads each member of a group computes.
        asked: the call.
    """

    transport: Transport
    groups: tuple[tuple[int, ...], ...]
    share: HeadShare
    asked: Asked

    def sizes(self, sizes: Sizes) -> Sizes:
        return Sizes(sizes.batch, self.share.queries(self.me), len(self.share.keys(self.me)))

    @property
    def adds_keys(self) -> bool:
        return self.share.replicates

    def inward(self, held: Held) -> Held:
        share, exchange = self.share, _Exchange(self, "tokens for heads")
        queries, keys = self.asked.queries, self.asked.keys
        for x in held.queries:
            exchange.add(
                x, lambda x, m: x[:, :, share.queries(m)], self._inward_shapes(x, queries, share.queries(self.me))
            )
        for x in held.keys:
            exchange.add(
                x, lambda x, m: x[:, :, share.distinct(m)], self._inward_shapes(x, keys, share.distinct(self.me))
            )
        for x in held.numbers:
            y = x.transpose(1, 2)[..., None]
            exchange.add(
                y, lambda x, m: x[:, :, share.queries(m)], self._inward_shapes(y, queries, share.queries(self.me))
            )
        arrived = exchange.run()
        n, end = len(held.queries), len(held.queries) + len(held.keys)
        numbers = [self._in_order(parts, self.query_places) for parts in arrived[end:]]
        return Held(
            tuple(self._in_order(parts, self.query_places) for parts in arrived[:n]),
            tuple(self._repeated(self._in_order(parts, self.key_places)) for parts in arrived[n:end]),
            tuple(x[..., 0].transpose(1, 2).contiguous() for x in numbers),
        )

    def outward(self, seen: Held) -> Held:
        exchange, of_queries, of_keys = _Exchange(self, "heads for tokens"), self.query_places, self.key_places
        T, K = (tokens.length(self.transport.rank) for tokens in (self.asked.queries, self.asked.keys))
        for x in seen.queries:
            exchange.add(
                x, lambda x, m: x.index_select(1, of_queries[m]), self._outward_shapes(x, T, self.share.queries)
            )
        for x in map(self._summed, seen.keys):
            exchange.add(x, lambda x, m: x.index_select(1, of_keys[m]), self._outward_shapes(x, K, self.share.distinct))
        for x in seen.numbers:
            y = x.transpose(1, 2)[..., None]
            exchange.add(
                y, lambda x, m: x.index_select(1, of_queries[m]), self._outward_shapes(y, T, self.share.queries)
            )
        arrived = exchange.run()
        n, end = len(seen.queries), len(seen.queries) + len(seen.keys)
        return Held(
            tuple(torch.cat(parts, 2) for parts in arrived[:n]),
            tuple(map(self._added, arrived[n:end])),
            tuple(torch.cat(parts, 2)[..., 0].transpose(1, 2).contiguous() for parts in arrived[end:]),
        )

    @cached_property
    def members(self) -> tuple[int, ...]:
        """The ranks that exchange heads."""
        return next(members for members in self.groups if self.transport.rank in members)

    @cached_property
    def me(self) -> int:
        """This rank's index among the members."""
        return self.members.index(self.transport.rank)

    @cached_property
    def query_places(self) -> list[Tensor]:
        """For each member, the indices of its queries among those of all members in ascending position."""
        return self._places(self.asked.queries)

    @cached_property
    def key_places(self) -> list[Tensor]:
        """The same of keys."""
        return self.query_places if self.asked.keys == self.asked.queries else self._places(self.asked.keys)

    @cached_property
    def _repeats(self) -> Tensor | None:
        repeats = self.share.repeats(self.me)
        return None if repeats is None else torch.tensor(repeats, device=self.asked.device)

    def _places(self, tokens: Tokens) -> list[Tensor]:
        positions = [tokens.positions(member) for member in self.members]
        places = torch.cat(positions).argsort().argsort().to(self.asked.device)
        return list(places.split([len(p) for p in positions]))

    def _inward_shapes(self, x: Tensor, tokens: Tokens, heads: slice) -> list[tuple[int, ...]]:
        """By members, the shape of what is received inward: the member's tokens, this rank's heads."""
        return [(x.shape[0], tokens.length(m), heads.stop - heads.start, x.shape[3]) for m in self.members]

    def _outward_shapes(self, x: Tensor, tokens: int, of: Callable[[int], slice]) -> list[tuple[int, ...]]:
        """By members, the shape of what is received outward: this rank's tokens, the member's heads."""
        counts = [of(m).stop - of(m).start for m in range(len(self.members))]
        return [(x.shape[0], tokens, count, x.shape[3]) for count in counts]

    def _in_order(self, parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """The tokens of all members, in ascending position."""
        B, _, *rest = parts[0].shape
        whole = parts[0].new_empty(B, sum(part.shape[1] for part in parts), *rest)
        for part, place in zip(parts, places, strict=True):
            whole.index_copy_(1, place, part)
        return whole

    def _repeated(self, x: Tensor) -> Tensor:
        return x if self._repeats is None else x.index_select(2, self._repeats)

    def _summed(self, x: Tensor) -> Tensor:
        """Gradients of each distinct key head: the sum over its repetitions."""
        if self._repeats is None:
            return x
        some = self.share.distinct(self.me)
        total = x.new_zeros(*x.shape[:2], some.stop - some.start, x.shape[3])
        for n, place in enumerate(self.share.repeats(self.me) or ()):
            total[:, :, place] += x[:, :, n]
        return total

    def _added(self, parts: Sequence[Tensor]) -> Tensor:
        """Gradients of all key heads: the sum over the members that computed them."""
        if not self.share.replicates:
            return torch.cat(list(parts), 2)
        total = parts[0].new_zeros(*parts[0].shape[:2], self.share.kv_heads, parts[0].shape[3])
        for member, part in enumerate(parts):
            total[:, :, self.share.distinct(member)] += part
        return total


class _Exchange:
    """The messages of several tensors, posted as one batch."""

    def __init__(self, among: AllToAll, what: str) -> None:
        self.among, self.what = among, what
        self._arrived: list[list[Tensor]] = []
        self._sends: list[Message] = []
        self._receives: list[Message] = []

    def add(self, x: Tensor, part: Callable[[Tensor, int], Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
        """Send ``part(x, m)`` to each member m, and receive a tensor of ``shapes[m]`` from it."""
        arrived = []
        for member, rank in enumerate(self.among.members):
            if member == self.among.me:
                arrived.append(part(x, member))
                continue
            arrived.append(x.new_empty(shapes[member]))
            self._sends.append(Message(part(x, member).contiguous(), rank, self.what))
            self._receives.append(Message(arrived[-1], rank, self.what))
        self._arrived.append(arrived)

    def run(self) -> list[list[Tensor]]:
        """What is received, by tensors and members."""
        # A rank without tokens sends nothing, and the others know that.
        sends = [message for message in self._sends if message.tensor.numel()]
        receives = [message for message in self._receives if message.tensor.numel()]
        self.among.transport.exchange(sends, receives).wait()
        return self._arrived
