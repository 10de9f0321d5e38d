"""Memory that the Hopper backward adds dQ up in.

[Note: shapes] as in `distflash.kernels.base`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distflash.kernels.hopper.tiles import QUERIES


def query_sums(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the float32 sums of dQ, see `in_fragments`, and its end: the counter of the tile scheduler, int32
    ``[2]``. Both start from zero, so one launch fills them.
    """
    sums = q.new_empty(math.prod(_fragments(q)) + 2, dtype=torch.float32)
    return sums, sums[-2:].view(torch.int32)


def _fragments(q: Tensor) -> tuple[int, int, int, int]:
    B, T, H, D = q.shape
    blocks = -(-D // 64)
    parts = max(2, blocks)
    return B * H * -(-T // QUERIES), parts, QUERIES, 64 * blocks // parts


def in_fragments(sums: Tensor, q: Tensor) -> Tensor:
    """The sums of `query_sums` in fragment order, see `fragments`: ``[B * H * tiles, PARTS, ROWS, N]``."""
    return sums[:-2].view(_fragments(q))


def semaphores(q: Tensor) -> Tensor:
    """Room for one for each tile of each head's queries: int32 ``[B * H, tiles]``."""
    B, T, H, _ = q.shape
    return q.new_empty(B * H, -(-T // QUERIES), dtype=torch.int32)
