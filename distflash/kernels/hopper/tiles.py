"""Which tile sizes the Hopper kernels run with, by padded head dim: measured, see ``benchmarks/NOTES.md``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardTile:
    """``consumers`` warpgroups of 64 queries each, ``block_n`` keys a step, ``stages`` of them in flight."""

    consumers: int
    block_n: int
    stages: int
    registers: int


@dataclass(frozen=True)
class BackwardTile:
    """128 keys stay, ``block_m`` queries a step, ``stages`` of them in flight."""

    block_m: int
    stages: int
    registers: int


FORWARD = {
    64: ForwardTile(consumers=2, block_n=128, stages=3, registers=240),
    128: ForwardTile(consumers=2, block_n=128, stages=2, registers=240),
    256: ForwardTile(consumers=2, block_n=64, stages=2, registers=240),
}
BACKWARD = {
    64: BackwardTile(block_m=128, stages=2, registers=240),
    128: BackwardTile(block_m=64, stages=2, registers=240),
}
