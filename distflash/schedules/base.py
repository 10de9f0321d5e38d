"""What a schedule is: in which order the owners' keys reach a rank, and how the keys' gradients get home.

A schedule knows who needs whose keys (a boolean table), and moves tensors; it knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from distflash.transport import Transport

# work[rank][owner]: does this rank need this owner's keys at all?
Work = Sequence[Sequence[bool]]


@dataclass(frozen=True)
class Step:
    """One step of a schedule, as one rank sees it.

    Attributes:
        owner: whose keys this rank works on.
        works: whether it works on them at all; if not, it only passes things on.
        source: the rank that the keys come from; None where they are its own or not needed.
        relays_to: ranks that take, for this step, the keys that this rank held at the step before.
        gives_to: ranks that take, for this step, this rank's own keys.
        home_from: the rank that works on this rank's own keys in this step; None where nobody does, or it is itself.
    """

    owner: int
    works: bool
    source: int | None = None
    relays_to: tuple[int, ...] = ()
    gives_to: tuple[int, ...] = ()
    home_from: int | None = None


class Homecoming(Protocol):
    """Brings the parts of this rank's dK and dV home, wherever they are computed."""

    def room(self, step: Step) -> tuple[Tensor, ...]:
        """Where this rank writes the gradients of ``step.owner``'s keys, whole."""
        ...

    def send(self, step: Step) -> None:
        """Start the exchange of a step. Called once for every step, after `room` is filled if ``step.works``."""
        ...

    def finish(self) -> tuple[Tensor, ...]:
        """The sums of all parts, rounded once to the dtype of the keys."""
        ...


@dataclass(frozen=True)
class Trip:
    """One pass of keys round the ring, as one rank makes it.

    Attributes:
        steps: from `Schedule.steps`.
        lengths: how many tokens each owner holds: dimension 1 of its tensors. All other dimensions agree.
        transport: this rank's.
    """

    steps: Sequence[Step]
    lengths: Sequence[int]
    transport: Transport

    def room(self, like: Sequence[Tensor], owner: int, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``flat`` buffers as contiguous tensors with the shapes of ``owner``'s."""
        shapes = [(t.shape[0], self.lengths[owner], *t.shape[2:]) for t in like]
        return tuple(f[: prod(s)].view(s) for f, s in zip(flat, shapes, strict=True))

    def flat(self, like: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Buffers that hold any owner's tensors."""
        longest = max(self.lengths)
        return tuple(t.new_empty(t.shape[0] * longest * prod(t.shape[2:]), dtype=dtype) for t in like)


class Schedule(Protocol):
    """In which order the owners' keys arrive. A new schedule is one file with an object that has these methods."""

    def steps(self, work: Work, rank: int) -> tuple[Step, ...]:
        """The steps of a rank. Every rank has equally many, so that they stay in step."""
        ...

    def visit(self, trip: Trip, kv: tuple[Tensor, ...]) -> Iterator[tuple[Step, tuple[Tensor, ...]]]:
        """Go through the steps; each comes with its owner's tensors, while the next step's are on their way.

        Args:
            trip: the way.
            kv: this rank's own tensors, contiguous, tokens in dimension 1.
        """
        ...

    def homecoming(self, trip: Trip, kv: tuple[Tensor, ...], dtype: torch.dtype) -> Homecoming:
        """The way back for gradients of tensors that go round by `visit`; parts are added in ``dtype``."""
        ...
