"""Which tile sizes the Hopper kernels run with, by head dim: measured, see ``docs/lab/hopper.md``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

# The backward kernel: keys of a work tile, and queries of a block, which is also the tile size of the dQ accumulator.
KEYS = 128
QUERIES = 64
# Padded head dims for which adding dQ in order is faster than the portable kernel's backward pass.
ORDERED = (128,)


def padded(dim: int) -> int:
    """A head dim padded for the kernels: the next power of two, at least 64."""
    return max(64, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class ForwardTile:
    """``consumers`` warpgroups of 64 queries each, ``block_n`` keys per step, ``stages`` steps in flight.

    Attributes:
        registers: of each consumer thread.
        slots: blocks of queries in shared memory at the same time.
        in_turn: a warpgroup does not overlap softmax and products; otherwise its P V overlaps its next softmax, which
            needs more registers.
        halves: P V overlaps up to the middle of that softmax, instead of up to its maximum.
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
    """``stages`` blocks of queries in flight.

    Attributes:
        registers: of each consumer thread.
        in_registers: keep the work tile's values, and its keys unless ``by_columns``, in registers, which saves shared
            memory.
        direct: a warpgroup adds its part of dQ to global memory itself, instead of through shared memory and the dQ
            warp.
        ordered: dQ is added in the order of key blocks, by the dQ warp; see `ordered`.
        by_columns: a work tile is 64 keys, of which one warpgroup has dK and the other dV; otherwise it is KEYS keys,
            half of them for each warpgroup.
    """

    stages: int
    registers: int
    in_registers: bool = False
    direct: bool = False
    by_columns: bool = False
    ordered: bool = False


_FORWARD = {
    64: ForwardTile(consumers=2, block_n=128, stages=3, registers=240),
    128: ForwardTile(consumers=2, block_n=128, stages=2, registers=240, halves=True),
    256: ForwardTile(consumers=2, block_n=64, stages=2, registers=240, slots=1, halves=True),
}
# Three warpgroups read keys less often; of a query's few keys, the larger blocks mask out more.
_FORWARD_LONG = _FORWARD | {64: ForwardTile(consumers=3, block_n=128, stages=3, registers=160, in_turn=True)}
# With dropout, integer arithmetic takes longer than the products, so nothing is gained by more of these in flight.
_FORWARD_DROPOUT = {
    64: replace(_FORWARD[64], halves=True),
    128: replace(_FORWARD[128], halves=False, in_turn=True),
    256: _FORWARD[256],
}
_FORWARD_NARROW = ForwardTile(consumers=3, block_n=64, stages=2, registers=160, slots=1, in_turn=True)
_BACKWARD = {
    64: BackwardTile(stages=2, registers=240, in_registers=True, direct=True),
    128: BackwardTile(stages=2, registers=240),
    256: BackwardTile(stages=2, registers=240, direct=True, by_columns=True),
}
_BACKWARD_ORDERED = replace(_BACKWARD[128], ordered=True)
_BACKWARD_NARROW = replace(_BACKWARD[256], in_registers=True)


@lru_cache(1024)
def forward_tile(d_qk: int, d_v: int, keys: float, has_dropout: bool = False) -> ForwardTile:
    """The shipped tile for these head dims.

    Args:
        d_qk, d_v: of queries and keys, and of values, which are no wider when padded.
        keys: how many a query sees on average.
    """
    if d_qk > 128 and d_v <= 128:
        return _FORWARD_NARROW
    if has_dropout:
        return _FORWARD_DROPOUT[padded(d_qk)]
    return (_FORWARD_LONG if keys >= 2048 else _FORWARD)[padded(d_qk)]


def backward_tile(d_qk: int, d_v: int, ordered: bool = False) -> BackwardTile:
    """The shipped tile for these head dims.

    Args:
        ordered: dQ is to be added in order, for head dims of ORDERED.
    """
    if ordered:
        return _BACKWARD_ORDERED
    if 128 < d_qk <= 192 and d_v <= 128:
        return _BACKWARD_NARROW
    return _BACKWARD[padded(d_qk)]
