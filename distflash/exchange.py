"""Carries out the transfers of a plan: receive buffers, and messages in flight.

[Note: tokens] Tensors are ``[B, T, heads, dim]`` or ``[B, heads, T]``: B batch, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distflash.plan import Plan, Stage, TensorKey, Transfer, What
from distflash.transport import Message, Pending, PointToPoint

Tensors = tuple[Tensor, ...]


@dataclass
class Exchange:
    """The tensors of one direction (forward or backward) of a call.

    Attributes:
        plan, transport: of this rank.
        prototypes: for each kind, tensors with the dtypes and shapes of its receive buffers, except for the number of
            tokens.
        on_arrival: what to do with a received kind; by default it is stored in ``tensors``.
        tensors: local and received tensors, by kind and source rank.
        derived: what is computed from ``tensors``, under the same keys (`TensorKey`), and freed with them: the softmax
            state of queries, or in backward what `Kernel.preprocess` prepares for them (lse, delta) and their dQ.
    """

    plan: Plan
    transport: PointToPoint
    prototypes: dict[What, Tensors]
    on_arrival: dict[What, Callable[[Transfer, Tensors], None]] = field(default_factory=dict)
    tensors: dict[TensorKey, Tensors] = field(default_factory=dict)
    derived: dict[TensorKey, Any] = field(default_factory=dict)
    _in_flight: list[tuple[int, Pending, list[tuple[Transfer, Tensors]]]] = field(default_factory=list)

    def walk(self, stages: Sequence[Stage], done_with: Sequence[frozenset[TensorKey]]) -> Iterator[Stage]:
        """Yield each stage while its transfers are in flight. Then wait for the tensors that the next stage reads.

        done_with: for each stage, the tensors that are freed after it, see `Plan.done_with`.
        """
        for number, stage in enumerate(stages):
            if stage.transfers:
                self._start(stage, number)
            yield stage
            if self._in_flight:
                self._finish(number + 1)
            for name in done_with[number]:
                self.tensors.pop(name, None)
                self.derived.pop(name, None)

    def keys(self, source: int, rows: range) -> tuple[Tensor, Tensor]:
        """These rows of a source's k and v, as views."""
        k, v = self.tensors[What.KEYS, source]
        if len(rows) == k.shape[1]:
            return k, v
        return k.narrow(1, rows.start, len(rows)), v.narrow(1, rows.start, len(rows))

    def _start(self, stage: Stage, number: int) -> None:
        for until, received, sent in stage.waits:
            arriving: list[tuple[Transfer, Tensors]] = []
            sends: list[Message] = []
            receives: list[Message] = []
            for transfer in received:
                buffers = self._receive_buffers(transfer)
                arriving.append((transfer, buffers))
                _add_messages(receives, transfer, buffers, number)
            for transfer in sent:
                _add_messages(sends, transfer, self._sent_tensors(transfer), number)
            self._in_flight.append((until, self.transport.exchange(sends, receives), arriving))

    def _finish(self, number: int) -> None:
        """Wait for the transfers that stage ``number`` needs."""
        in_flight, self._in_flight = self._in_flight, []
        for each in in_flight:
            until, pending, arriving = each
            if until > number:
                self._in_flight.append(each)
                continue
            pending.wait()
            for transfer, tensors in arriving:
                store = self.on_arrival.get(transfer.what)
                if store is None:
                    self.tensors[transfer.what, transfer.of] = tensors
                else:
                    store(transfer, tensors)

    def _receive_buffers(self, transfer: Transfer) -> Tensors:
        """Contiguous buffers for a transfer that is received."""
        buffers: Tensors = ()
        for x in self.prototypes[transfer.what]:
            shape = list(x.shape)
            shape[1 if x.dim() == 4 else 2] = transfer.count  # `token_dim`, inlined to save host time
            buffers += (x.new_empty(shape),)
        return buffers

    def _sent_tensors(self, transfer: Transfer) -> Sequence[Tensor]:
        """The tensors of a transfer that is sent, contiguous."""
        tensors = self.tensors[transfer.what, transfer.of]
        if transfer.what in _SENT_ONCE:
            del self.tensors[transfer.what, transfer.of]  # only the messages refer to them now
        return tensors if transfer.rows is None else [take(x, transfer.rows) for x in tensors]


def _add_messages(messages: list[Message], transfer: Transfer, tensors: Sequence[Tensor], number: int) -> None:
    # Error messages name keys by the ring step that reads them, and gradients by the one that computed them.
    step = number - 1 if transfer.what in _SENT_ONCE else transfer.until
    words = _words(transfer.what, step)
    for x in tensors:
        messages.append(Message(x, transfer.peer, words))


# The kinds that a rank computes for another one: they are sent once, and not kept afterwards.
_SENT_ONCE = frozenset({What.KEY_GRADIENTS, What.QUERY_GRADIENTS, What.PARTIALS})
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


def token_dim(x: Tensor) -> int:
    """The dimension of the tokens, see [Note: tokens]."""
    return 1 if x.dim() == 4 else 2


def take(x: Tensor, rows: tuple[range, ...] | None) -> Tensor:
    """The tokens in ``rows`` of ``x``, contiguous; a view if they already are contiguous in memory."""
    if rows is None:
        return x
    dim = 1 if x.dim() == 4 else 2
    if len(rows) == 1:
        if len(rows[0]) == x.shape[dim]:
            return x.contiguous()
        return x.narrow(dim, rows[0].start, len(rows[0])).contiguous()
    return torch.cat([x.narrow(dim, r.start, len(r)) for r in rows], dim)


def copy_of(x: Tensor, rows: tuple[range, ...]) -> Tensor:
    """A new contiguous copy of the tokens in ``rows``; never a view of ``x``, as `take` may return."""
    dim = token_dim(x)
    pieces = [x.narrow(dim, r.start, len(r)) for r in rows]
    shape = list(x.shape)
    shape[dim] = sum(map(len, rows))
    into = x.new_empty(shape)
    return torch.cat([x.narrow(dim, 0, 0), *pieces], dim, out=into)
