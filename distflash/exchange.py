"""The transfers of a plan: which tensors a rank has, and which messages are in flight.

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
    """The tensors of one direction (forward or backward) of a call.

    Attributes:
        plan, transport: of this rank.
        like: for each kind that is received, tensors with the same dtypes and shapes, apart from the number of tokens.
        on_arrival: what to do with a received kind; by default it is stored in ``at_hand``.
        at_hand: the local and received tensors, by kind and source rank.
        derived: objects made from tensors at hand, by the same keys; both are freed together.
    """

    plan: Plan
    transport: Exchanges
    like: dict[What, Tensors]
    on_arrival: dict[What, Callable[[Transfer, Tensors], None]] = field(default_factory=dict)
    at_hand: dict[Arrived, Tensors] = field(default_factory=dict)
    derived: dict[Arrived, Any] = field(default_factory=dict)
    _in_flight: list[tuple[int, Pending, list[tuple[Transfer, Tensors]]]] = field(default_factory=list)

    def walk(self, stages: Sequence[Stage], done_with: Sequence[frozenset[Arrived]]) -> Iterator[Stage]:
        """Yield each stage while its transfers are in flight, and wait for those that the next stage reads."""
        for number, stage in enumerate(stages):
            if stage.transfers:
                self._start(stage, number)
            yield stage
            if self._in_flight:
                self._finish(number + 1)
            for name in done_with[number]:
                self.at_hand.pop(name, None)
                self.derived.pop(name, None)

    def keys(self, source: int, rows: range) -> tuple[Tensor, Tensor]:
        """These rows of a source's k and v, as views."""
        k, v = self.at_hand[What.KEYS, source]
        if len(rows) == k.shape[1]:
            return k, v
        return k[:, rows.start : rows.stop], v[:, rows.start : rows.stop]

    def _start(self, stage: Stage, number: int) -> None:
        for until in sorted({transfer.until for transfer in stage.transfers}):
            group = [transfer for transfer in stage.transfers if transfer.until == until]
            arriving = [(t, self._receive_buffers(t)) for t in group if not t.sends]
            sends = [message for t in group if t.sends for message in self._messages(t, self._sent_tensors(t), number)]
            receives = [message for t, tensors in arriving for message in self._messages(t, tensors, number)]
            self._in_flight.append((until, self.transport.exchange(sends, receives), arriving))

    def _finish(self, number: int) -> None:
        """Wait for the transfers that stage ``number`` needs."""
        due = [each for each in self._in_flight if each[0] <= number]
        self._in_flight = [each for each in self._in_flight if each[0] > number]
        for _, pending, arriving in due:
            pending.wait()
            for transfer, tensors in arriving:
                self._arrived(transfer, tensors)

    def _arrived(self, transfer: Transfer, tensors: Tensors) -> None:
        if transfer.what in self.on_arrival:
            self.on_arrival[transfer.what](transfer, tensors)
        else:
            self.at_hand[transfer.what, transfer.of] = tensors

    def _receive_buffers(self, transfer: Transfer) -> Tensors:
        """Contiguous buffers for a transfer that is received."""
        return tuple(x.new_empty(_with_tokens(x, transfer.count)) for x in self.like[transfer.what])

    def _sent_tensors(self, transfer: Transfer) -> Tensors:
        """The tensors of a transfer that is sent, contiguous."""
        tensors = self.at_hand[transfer.what, transfer.of]
        if transfer.what in (What.KEY_GRADIENTS, What.QUERY_GRADIENTS, What.PARTIALS):
            del self.at_hand[transfer.what, transfer.of]  # only the messages refer to them now
        return tuple(take(x, transfer.rows) for x in tensors)

    def _messages(self, transfer: Transfer, tensors: Tensors, number: int) -> Iterator[Message]:
        # Error messages name keys by the step that reads them, and gradients by the step that computed them.
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
    shape[1 if x.dim() == 4 else 2] = count  # as `tokens_of`, without a call: this is of every message
    return shape


def tokens_of(x: Tensor) -> int:
    """Which dimension counts tokens: see [Note: tokens]."""
    return 1 if x.dim() == 4 else 2


def take(x: Tensor, rows: tuple[range, ...] | None) -> Tensor:
    """The tokens in ``rows`` of ``x``, contiguous; a view if they already are contiguous in memory."""
    if rows is None:
        return x
    dim = 1 if x.dim() == 4 else 2
    pieces = [x.narrow(dim, r.start, len(r)) for r in rows]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim)


def copy_of(x: Tensor, rows: tuple[range, ...]) -> Tensor:
    """The tokens in ``rows`` of ``x``, in memory of their own: strides and alignment do not depend on the rest."""
    dim = tokens_of(x)
    pieces = [x.narrow(dim, r.start, len(r)) for r in rows]
    into = x.new_empty(_with_tokens(x, sum(map(len, rows))))
    return torch.cat([x.narrow(dim, 0, 0), *pieces], dim, out=into)
