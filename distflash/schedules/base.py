"""The interface of schedules. A schedule decides what ranks send to each other, and when, and compiles a `Plan`.

It reads which rank needs which keys (`Needs`), and knows no mask, layout or kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from distflash.geometry import Geometry, Tokens
from distflash.intervals import build
from distflash.placement import Placement
from distflash.plan import Gradients, Pass, Plan
from distflash.transport import PointToPoint, Transport


@dataclass(frozen=True)
class Asked:
    """What a schedule needs to know of a call to choose its placement.

    Attributes:
        queries, keys: the tokens that each rank holds.
        heads, kv_heads: the number of query heads and of key heads.
        device: of the tensors.
    """

    queries: Tokens
    keys: Tokens
    heads: int
    kv_heads: int
    device: torch.device


class Schedule(ABC):
    """A context-parallel algorithm. A new schedule is one frozen dataclass with one method, `plan`.

    Attributes:
        reproducible: whether results have the same bits on any number of ranks, for which kernels have to give the same
            bits in every run.
    """

    reproducible: ClassVar[bool] = False

    def on(self, shape: tuple[int, ...]) -> Schedule:
        """The same schedule for a mesh of this shape, whose last dimension has consecutive ranks."""
        return self

    def placement(self, among: Transport, asked: Asked) -> Placement | None:
        """The redistribution of users' tensors before the plan runs; None if there is none.

        Raises:
            ValueError: the schedule does not support the call.
        """
        return None

    def among(self, transport: Transport) -> PointToPoint:
        """The transport between the ranks of a plan; by default all ranks of ``transport``."""
        return transport

    @abstractmethod
    def plan(self, geometry: Geometry, rank: int) -> Plan:
        """The plan of ``rank``. All ranks have the same number of stages, forward and backward.

        Intervals are on the CPU. Each pass has one source and all heads; `distflash.overlap` optimises the plan
        afterwards.

        Raises:
            ValueError: the mask or the layout, which may be the user's own, returns something invalid.
        """


def require_whole(plan: Plan, schedule: Schedule) -> None:
    """Refuse a plan whose passes miss keys that the rank's queries see, or compute them twice.

    For schedules that users write. Plans that send queries are not checked: other ranks compute part of their pairs.

    Raises:
        RuntimeError: on the rank of the plan.
    """
    if plan.moves_queries:
        return
    allowed = int(plan.pairs[plan.rank].sum())
    for name, passes in (("forward", plan.passes), ("backward", plan.backward_passes)):
        computed = sum(each.pairs for each in passes if each.gradients is not Gradients.OF_KEYS)
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
        queries: the rank of the queries.
        source: the rank of the keys.
        rows: the ranges of the source's keys that the rank has received; None for all.
    """
    parts = build(geometry, queries, source, rows)
    return tuple(Pass(queries, (source,), (part,), adds=n > 0) for n, part in enumerate(parts))
