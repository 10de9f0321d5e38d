"""Carrying out the transfers of a plan: which tensors a rank has at hand, and which are on their way.

[Note: tokens] Tensors are ``[B, T, heads, dim]`` or ``[B, heads, T]``: B batch, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distflash.plan import Arrived, Plan, Stage, Transfer, What
from distflash.transport import Exchanges, Message, Pending

Tensors = tuple[Tensor, ...]


@dataclass
class Exchange:
    """The tensors of one direction of a call.

    Attributes:
        plan, transport: of this rank.
        like: for each kind that arrives, tensors of this rank with its shapes (but for tokens) and dtypes.
        on_arrival: what is done with what has arrived; by default it is put at hand.
        at_hand: tensors by what they are and whose.
        derived: what was made of tensors at hand, by the same names; both are let go of together.
    """

    plan: Plan
    transport: Exchanges
    like: dict[What, Tensors]
    on_arrival: dict[What, Callable[[Transfer, Tensors], None]] = field(default_factory=dict)
    at_hand: dict[Arrived, Tensors] = field(default_factory=dict)
    derived: dict[Arrived, Any] = field(default_factory=dict)
    _under_way: list[tuple[int, Pending, list[tuple[Transfer, Tensors]]]] = field(default_factory=list)

    def walk(self, stages: Sequence[Stage], done_with: Sequence[frozenset[Arrived]]) -> Iterator[Stage]:
        """Each stage, while its transfers run."""
        for number, stage in enumerate(stages):
            if stage.transfers:
                self._start(stage, number)
            yield stage
            if self._under_way:
                self._finish(number + 1)
            for name in done_with[number]:
                self.at_hand.pop(name, None)
                self.derived.pop(name, None)

    def keys(self, source: int, some: range) -> tuple[Tensor, Tensor]:
        """K and v of some of a source's keys at hand."""
        k, v = self.at_hand[What.KEYS, source]
        if len(some) == k.shape[1]:
            return k, v
        return k[:, some.start : some.stop], v[:, some.start : some.stop]

    def _start(self, stage: Stage, number: int) -> None:
        for until in sorted({transfer.until for transfer in stage.transfers}):
            some = [transfer for transfer in stage.transfers if transfer.until == until]
            arriving = [(t, self._room(t)) for t in some if not t.sends]
            sends = [message for t in some if t.sends for message in self._messages(t, self._taken(t), number)]
            receives = [message for t, tensors in arriving for message in self._messages(t, tensors, number)]
            self._under_way.append((until, self.transport.exchange(sends, receives), arriving))

    def _finish(self, number: int) -> None:
        """Wait for what has to be there by the beginning of stage ``number``."""
        due = [each for each in self._under_way if each[0] <= number]
        self._under_way = [each for each in self._under_way if each[0] > number]
        for _, pending, arriving in due:
            pending.wait()
            for transfer, tensors in arriving:
                self._arrived(transfer, tensors)

    def _arrived(self, transfer: Transfer, tensors: Tensors) -> None:
        if transfer.what in self.on_arrival:
            self.on_arrival[transfer.what](transfer, tensors)
        else:
            self.at_hand[transfer.what, transfer.of] = tensors

    def _room(self, transfer: Transfer) -> Tensors:
        """Contiguous buffers for what arrives."""
        return tuple(x.new_empty(_with_tokens(x, transfer.count)) for x in self.like[transfer.what])

    def _taken(self, transfer: Transfer) -> Tensors:
        """What is sent, contiguous."""
        tensors = self.at_hand[transfer.what, transfer.of]
        if transfer.what in (What.KEY_GRADIENTS, What.QUERY_GRADIENTS, What.PARTIALS):
            del self.at_hand[transfer.what, transfer.of]  # kept by the messages alone
        return tuple(take(x, transfer.rows) for x in tensors)

    def _messages(self, transfer: Transfer, tensors: Tensors, number: int) -> Iterator[Message]:
        # Keys are named by the step that they are for, gradients by the one that they come from.
        step = transfer.until if transfer.what in (What.KEYS, What.QUERIES) else number - 1
        words = _words(transfer.what, step)
        return (Message(x, transfer.peer, words) for x in tensors)


_WORDS = {
    What.KEYS: "the keys",
    What.KEY_GRADIENTS: "the gradients",
    What.QUERIES: "the queries",
    What.QUERY_GRADIENTS: "the gradients of queries",
    What.PARTIALS: "the partial states",
}


@functools.cache
def _words(what: What, step: int) -> str:
    return f"{_WORDS[what]} of step {step}"


def _with_tokens(x: Tensor, count: int) -> list[int]:
    shape = list(x.shape)
    shape[1 if x.dim() == 4 else 2] = count
    return shape


def take(x: Tensor, rows: tuple[range, ...] | None) -> Tensor:
    """The tokens in ``rows`` of ``x [B, T, ...]``, contiguous; no copy where they lie side by side in memory."""
    if rows is None:
        return x
    pieces = [x[:, r.start : r.stop] for r in rows]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, 1)
