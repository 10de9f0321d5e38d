"""The ring: in step t a rank works on the keys of the rank t places before it.

While a step computes, the next step's keys are on their way. They come from the neighbour, which has worked on them in
the step before (https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass

from distflash.schedules.travel import KeysTravel


@dataclass(frozen=True)
class Ring(KeysTravel):
    """Point-to-point ring with one step of prefetch."""

    def sources(self, rank: int, world_size: int) -> tuple[tuple[int, ...], ...]:
        return tuple(((rank - step) % world_size,) for step in range(world_size))

    def route(self, rank: int, source: int, world_size: int) -> int:
        return (rank - 1) % world_size
