"""Ring attention: in step t, rank r attends to the K/V of rank ``(r - t) % W``.

K/V of the next step are prefetched from rank r - 1 (which attends to them now) during this step's compute
(https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass

from distflash.schedules.travel import KeysTravel


@dataclass(frozen=True)
class Ring(KeysTravel):
    """Point-to-point ring with one step of prefetch. `KeysTravel` makes the plan from `sources` and `route`.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, schedule=df.Ring())
        >>> print(cp.plan(df.Causal(), seq_len=64))
        Plan of rank 0 of 2: 1040 allowed pairs
        percent of all pairs, by rank: 50.0, 50.0
        remote keys, by rank: 32, 16 (each: k and v of one token)
        forward    computes                           meanwhile
          stage 0  keys of 0[0:32]: 528 pairs, first  receive keys of 1 (32) from 1
                                                      send keys of 0 (16) to 1
          stage 1  keys of 1[0:32]: 512 pairs, last   -
        backward   computes                           meanwhile
          stage 0  keys of 0[0:32]: 528 pairs, first  receive keys of 1 (32) from 1
                                                      send keys of 0 (16) to 1
          stage 1  keys of 1[0:32]: 512 pairs, last   -
          stage 2  -                                  send dK, dV of 1 (32) to 1
                                                      receive dK, dV of 0 (16) from 1
    """

    def sources(self, rank: int, world_size: int) -> tuple[tuple[int, ...], ...]:
        """For each step, the ranks whose keys this rank attends to; in a ring, one rank per step."""
        return tuple(((rank - step) % world_size,) for step in range(world_size))

    def route(self, rank: int, source: int, world_size: int) -> int:
        """Keys come from the previous rank of the ring."""
        return (rank - 1) % world_size
