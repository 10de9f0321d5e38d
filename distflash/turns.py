"""Whose turn it is to add to a tile of dQ, if that has an order: counts of blocks of keys, from column bounds.

They belong to a pass of the plan (`Pass.turns`) if the kernel asks for them (`Abilities.ordered_blocks`).

A block of keys adds to tiles ``[begin, end)`` of queries, of which neither decreases from block to block, or to none.
So of the blocks before one that adds to a tile, those that add to the tile, too, are all but those that add to none
and those whose tiles end at or before it. A semaphore that starts at the number of the latter, and that each block
increments, is at the number of earlier blocks with tiles when it is a block's turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.host_to_device import to_device
from distflash.intervals import Intervals


@dataclass(frozen=True, eq=False)
class Turns:
    """Of one pass, the same for every head.

    Attributes:
        earlier: int32 ``[blocks]``: the number of earlier blocks of keys that add to any tile. It is a block's
            turn at a tile when the tile's semaphore is at this number.
        ended: int32 ``[tiles]``: at which number the semaphore of each tile of queries starts.
    """

    earlier: Tensor
    ended: Tensor

    def to(self, device: torch.device) -> Turns:
        return Turns(to_device(self.earlier, device), to_device(self.ended, device))


def turns_of(rows: Intervals, keys: int, queries: int) -> Turns:
    """On the device of the intervals, without waiting for it. keys, queries: of a block, and of a tile."""
    device, K = rows.col_lo.device, len(rows.col_lo)
    tiles = torch.arange(-(-len(rows.row_lo) // queries), device=device)
    first = torch.arange(0, K, keys, device=device)
    start, stop = rows.col_lo[first], rows.col_hi[(first + keys - 1).clamp_max(K - 1)]
    any_tile = (stop > start).int()
    up_to = any_tile.cumsum(0, dtype=torch.int32)
    ends = (stop + queries - 1) // queries
    ended = torch.searchsorted(ends.long(), tiles, right=True)
    return Turns(up_to - any_tile, torch.cat([up_to.new_zeros(1), up_to])[ended])
