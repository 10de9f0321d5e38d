"""Which tile sizes the Hopper kernels run with, by padded head dim: measured, see ``benchmarks/NOTES.md``."""

from __future__ import annotations

from dataclasses import dataclass

# The backward kernel: keys of a program's block, which stay, and queries of a tile, in which sums of dQ are kept, too.
KEYS = 128
QUERIES = 64


def padded(dim: int) -> int:
    """A head dim as the kernels see it: the next power of two, 64 at least."""
    return max(64, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class ForwardTile:
    """``consumers`` warpgroups of 64 queries each, ``block_n`` keys a step, ``stages`` of them in flight.

    Attributes:
        registers: of each consumer's threads.
        slots: blocks of queries that have a place in shared memory.
        in_turn: softmax and products of a warpgroup take turns; otherwise its P V runs under its next softmax, for
            which there have to be registers.
        halves: up to the middle of that softmax, rather than to its maximum.
    """

    consumers: int
    block_n: int
    stages: int
    registers: int
    slots: int = 2
    in_turn: bool = False
    halves: bool = False


@dataclass(frozen=True)
class BackwardTile:
    """``stages`` tiles of queries in flight.

    Attributes:
        registers: of each consumer's threads.
        in_registers: the block's keys and values stay in registers, where there are enough: shared memory is the limit.
        direct: a warpgroup adds its part of dQ to memory itself, rather than by way of shared memory and another warp.
    """

    stages: int
    registers: int
    in_registers: bool = False
    direct: bool = False


_FORWARD = {
    64: ForwardTile(consumers=2, block_n=128, stages=3, registers=240),
    128: ForwardTile(consumers=2, block_n=128, stages=2, registers=240, halves=True),
    256: ForwardTile(consumers=2, block_n=64, stages=2, registers=240, slots=1, halves=True),
}
# Three warpgroups read keys less often, and waste more where masks cut through their tiles.
_FORWARD_LONG = _FORWARD | {64: ForwardTile(consumers=3, block_n=128, stages=3, registers=160, in_turn=True)}
_BACKWARD = {
    64: BackwardTile(stages=2, registers=240, in_registers=True, direct=True),
    128: BackwardTile(stages=2, registers=240),
}


def forward_tile(padded_dim: int, keys: float, density: float = 1.0) -> ForwardTile:
    """The shipped tile.

    Args:
        padded_dim: the larger of the padded head dims.
        keys: how many a query sees on average.
        density: the share of (query, key) pairs that the mask allows: the lower, the more tiles it cuts through.
    """
    return (_FORWARD_LONG if keys * density >= 2048 else _FORWARD)[padded_dim]


def backward_tile(padded_dim: int) -> BackwardTile:
    """The shipped tile for the larger padded head dim."""
    return _BACKWARD[padded_dim]
