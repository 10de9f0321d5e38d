"""The ring: at step t a rank works on the keys of the owner t places before it.

While a step computes, the next step's keys are in flight into the other of two buffers. A step that no rank needs is
not made. Keys come from the nearest rank that has them: from the neighbour if it worked on them in the step before
(the classical ring, https://arxiv.org/abs/2310.01889), otherwise straight from their owner, so that a mask that skips
owners costs no passing on of keys that nobody on the way needs.

Parts of dK and dV go straight home to their owner, which adds them in the order of the steps: the same order, and so
the same bits, in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.schedules.base import Step, Trip, Work
from distflash.transport import Message, Pending


@dataclass(frozen=True)
class Ring:
    """Point-to-point ring with one step of prefetch."""

    def steps(self, work: Work, rank: int) -> tuple[Step, ...]:
        W = len(work)
        made = [t for t in range(W) if t == 0 or any(work[r][(r - t) % W] for r in range(W))]
        return tuple(_step(work, rank, t) for t in made)

    def visit(self, trip: Trip, kv: tuple[Tensor, ...]) -> Iterator[tuple[Step, tuple[Tensor, ...]]]:
        buffers = _Buffers(trip, kv)
        held = kv
        for number, (step, following) in enumerate(zip(trip.steps, (*trip.steps[1:], None), strict=True), start=1):
            if following is None:
                yield step, held
                return
            arriving = buffers.next(following.owner) if following.source is not None else ()
            in_flight = _start(trip, number, kv, held, arriving)
            yield step, held
            in_flight.wait()
            held = arriving or held

    def homecoming(self, trip: Trip, kv: tuple[Tensor, ...], dtype: torch.dtype) -> RingHomecoming:
        return RingHomecoming(trip, kv, dtype)


def _source(work: Work, rank: int, t: int) -> int | None:
    """Which rank the keys of step ``t`` come from."""
    W = len(work)
    owner, neighbour = (rank - t) % W, (rank - 1) % W
    if t == 0 or not work[rank][owner]:
        return None
    return neighbour if work[neighbour][owner] else owner


def _step(work: Work, rank: int, t: int) -> Step:
    W = len(work)
    neighbour, farthest = (rank + 1) % W, (rank + t) % W
    # Two ranks may take keys from this one: the neighbour those held until now, and the rank t places on its own.
    # At t = 1 they are one and the same.
    relays = t > 1 and _source(work, neighbour, t) == rank
    gives = t > 0 and _source(work, farthest, t) == rank
    return Step(
        owner=(rank - t) % W,
        works=work[rank][(rank - t) % W],
        source=_source(work, rank, t),
        relays_to=(neighbour,) if relays else (),
        gives_to=(farthest,) if gives else (),
        home_from=farthest if t > 0 and work[farthest][rank] else None,
    )


def _start(
    trip: Trip, number: int, own: tuple[Tensor, ...], held: tuple[Tensor, ...], arriving: tuple[Tensor, ...]
) -> Pending:
    """Start the exchange that brings the keys of step ``number``."""
    step, what = trip.steps[number], f"the keys of ring step {number}"
    sends = [Message(tensor, peer, what) for peer in step.relays_to for tensor in held]
    sends += [Message(tensor, peer, what) for peer in step.gives_to for tensor in own]
    receives = [] if step.source is None else [Message(tensor, step.source, what) for tensor in arriving]
    return trip.transport.exchange(sends, receives)


class _Buffers:
    """Two sets of receive buffers in turn, the second only where a second is needed."""

    def __init__(self, trip: Trip, like: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> None:
        self._trip, self._like, self._dtype = trip, like, dtype
        self._spare: list[tuple[Tensor, ...]] = []
        self._last: tuple[Tensor, ...] | None = None

    def next(self, owner: int) -> tuple[Tensor, ...]:
        """Room for ``owner``'s tensors, other than what `next` gave the last time."""
        flat = self._spare.pop() if self._spare else self._trip.flat(self._like, self._dtype)
        if self._last is not None:
            self._spare.append(self._last)
        self._last = flat
        return self._trip.room(self._like, owner, flat)


class RingHomecoming:
    """Sums the parts of this rank's dK and dV in the order of the steps. See `Homecoming`."""

    def __init__(self, trip: Trip, kv: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        self._trip, self._kv = trip, kv
        self._rank = trip.transport.rank
        shared = any(step.home_from is not None for step in trip.steps)
        self._own = tuple(torch.empty_like(t, dtype=dtype if shared else t.dtype) for t in kv)
        self._incoming = tuple(torch.empty_like(t) for t in self._own) if shared else ()
        self._outgoing = _Buffers(trip, kv, dtype)
        self._rooms: tuple[Tensor, ...] = ()
        self._in_flight: tuple[Step, Pending] | None = None
        if not any(step.works and step.owner == self._rank for step in trip.steps):
            for t in self._own:
                t.zero_()

    def room(self, step: Step) -> tuple[Tensor, ...]:
        self._rooms = self._own if step.owner == self._rank else self._outgoing.next(step.owner)
        return self._rooms

    def send(self, step: Step) -> None:
        if self._arrived():
            for own, part in zip(self._own, self._incoming, strict=True):
                own += part
        away = step.works and step.owner != self._rank
        what = f"the gradients of ring step {self._trip.steps.index(step)}"
        sends = [Message(part, step.owner, what) for part in self._rooms] if away else []
        receives = [] if step.home_from is None else [Message(part, step.home_from, what) for part in self._incoming]
        self._in_flight = step, self._trip.transport.exchange(sends, receives)

    def finish(self) -> tuple[Tensor, ...]:
        if not self._arrived():
            return tuple(own.to(t.dtype) for own, t in zip(self._own, self._kv, strict=True))
        # The last addition and the only rounding are one pass.
        return tuple(
            torch.add(own, part, out=torch.empty_like(t))
            for own, part, t in zip(self._own, self._incoming, self._kv, strict=True)
        )

    def _arrived(self) -> bool:
        """Wait for the exchange in flight, if any; whether it brought a part that is still to be added."""
        if self._in_flight is None:
            return False
        step, pending = self._in_flight
        self._in_flight = None
        pending.wait()
        return step.home_from is not None
