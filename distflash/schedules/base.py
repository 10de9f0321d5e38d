"""What a schedule is: it decides what travels between ranks, and when, and compiles that into a `Plan`.

A schedule sees which rank needs which keys (`Needs`); it knows no mask, no layout and no kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from distflash.geometry import Geometry, Tokens
from distflash.intervals import build
from distflash.placement import Placement
from distflash.plan import Pass, Plan
from distflash.transport import Exchanges, Transport


@dataclass(frozen=True)
class Asked:
    """What a schedule is told of a call beside its mask.

    Attributes:
        queries, keys: those that each rank's user holds.
        heads, kv_heads: how many.
        device: of the tensors.
    """

    queries: Tokens
    keys: Tokens
    heads: int
    kv_heads: int
    device: torch.device


class Schedule(ABC):
    """How the ranks bring queries and keys together. A new schedule is one frozen dataclass with one method, `plan`."""

    def on(self, shape: tuple[int, ...]) -> Schedule:
        """The same schedule for a mesh of this shape, on which ranks are numbered along the last dimension."""
        return self

    def placement(self, among: Transport, asked: Asked) -> Placement | None:
        """What becomes of users' tensors before the plan begins; None if they stay as they are.

        Raises:
            ValueError: the schedule cannot take the call.
        """
        return None

    def among(self, transport: Transport) -> Exchanges:
        """The ranks that plans speak of; by default those of the transport."""
        return transport

    @abstractmethod
    def plan(self, geometry: Geometry, rank: int) -> Plan:
        """What ``rank`` does. Every rank has equally many stages, forward and backward, so that they stay in step.

        Intervals are on the CPU, passes take one source each, and all heads: what else makes a call fast is done to
        the plan afterwards (`distflash.overlap`).

        Raises:
            ValueError: the mask or the layout, which may be the user's own, breaks its promises.
        """


def require_whole(plan: Plan, schedule: Schedule) -> None:
    """Refuse a plan whose passes leave out keys that the rank's queries see, or take them twice.

    A schedule may be the user's own. Where queries travel nothing is checked: their pairs are in other ranks' plans.

    Raises:
        RuntimeError: on the rank whose plan it is.
    """
    if plan.moves_queries:
        return
    allowed = int(plan.pairs[plan.rank].sum())
    for name, passes in (("forward", plan.passes), ("backward", plan.backward_passes)):
        computed = sum(each.pairs for each in passes)
        if computed != allowed:
            raise RuntimeError(
                f"schedule: {schedule!r}.plan has rank {plan.rank} compute {computed} pairs {name}, but its queries "
                f"have {allowed}; expected passes over every source in geometry, each once"
            )


def passes_over(
    geometry: Geometry, queries: int, source: int, rows: tuple[range, ...] | None = None
) -> tuple[Pass, ...]:
    """The passes of one rank's queries over one source's keys: one for each part of the mask.

    Args:
        geometry: of the call.
        queries, source: ranks.
        rows: those of the source's keys that are at hand; None for all.
    """
    parts = build(geometry, queries, source, rows)
    return tuple(Pass(queries, (source,), (part,), adds=n > 0) for n, part in enumerate(parts))
