"""Routes: which rows ranks send to each other, so that each has rows at the positions that it wants.

A rank wants rows at global positions, in any order, possibly more than once. It holds some of them. It receives each
other row once, from the rank that holds it. A `Route` depends only on layouts, documents and lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from distflash.host_to_device import to_device
from distflash.layouts import Layout
from distflash.masks import Documents

# The position of a row of zeros.
NOWHERE = -1

# Routes kept: the layers of a step use the same few.
_ROUTES = 32


@dataclass(frozen=True)
class Route:
    """How one rank gets the rows that it wants.

    Attributes:
        held: the number of rows that this rank holds.
        sends: by rank, int64: the indices of this rank's rows that are sent to it. Empty for this rank.
        receives: by rank, the number of rows that are received from it.
        index: int64 ``[wanted]``: the index of each wanted row in the concatenation of this rank's rows, the received
            rows by rank, and a row of zeros.
    """

    held: int
    sends: tuple[Tensor, ...]
    receives: tuple[int, ...]
    index: Tensor

    def to(self, device: torch.device) -> Route:
        """The same with every tensor on ``device``."""
        sends = tuple(to_device(rows, device) for rows in self.sends)
        return replace(self, sends=sends, index=to_device(self.index, device))


def route(wanted: Sequence[Tensor], layout: Layout, seq_len: int, rank: int) -> Route:
    """The route of ``rank``, on the CPU.

    Args:
        wanted: by rank, int64: the global positions of the rows that it wants, `NOWHERE` for zeros.
        layout: which rows each rank holds.
        seq_len: the global length.
    """
    world_size = len(wanted)
    held = layout.positions(seq_len, world_size, rank)
    foreign = [_others(positions, layout, seq_len, world_size, each) for each, positions in enumerate(wanted)]
    sends = tuple(_place(_held(positions, held), held) for positions in foreign)
    received = [_held(foreign[rank], layout.positions(seq_len, world_size, source)) for source in range(world_size)]
    pool, order = torch.cat([held, *received]).sort()
    index = torch.full_like(wanted[rank], len(pool))
    somewhere = wanted[rank] != NOWHERE
    index[somewhere] = order[_place(wanted[rank][somewhere], pool)]
    return Route(len(held), sends, tuple(map(len, received)), index)


@lru_cache(_ROUTES)
def relayout_route(
    source: Layout, target: Layout, seq_len: int, world_size: int, rank: int, device: torch.device
) -> Route:
    """The route from one layout to another."""
    wanted = [target.positions(seq_len, world_size, each) for each in range(world_size)]
    return route(wanted, source, seq_len, rank).to(device)


@lru_cache(_ROUTES)
def halo_route(
    left: int,
    documents: Documents | None,
    layout: Layout,
    seq_len: int,
    world_size: int,
    rank: int,
    device: torch.device,
) -> tuple[Route, Tensor]:
    """The route to a rank's rows with ``left`` rows before each run, and the indices of its own rows among them."""
    held = [layout.positions(seq_len, world_size, each) for each in range(world_size)]
    wanted = [_with_halo(positions, left, documents, seq_len) for positions in held]
    places = to_device(wanted[rank][1], device)
    return route([positions for positions, _ in wanted], layout, seq_len, rank).to(device), places


def _with_halo(held: Tensor, left: int, documents: Documents | None, seq_len: int) -> tuple[Tensor, Tensor]:
    """The positions of a rank's rows with their halo, and the indices of its own rows among them.

    A run consists of consecutive tokens of one document. Rows before the start of the document are zeros.
    """
    starts = torch.zeros_like(held) if documents is None else documents.ends(held, seq_len)[0]
    begins = torch.ones_like(held, dtype=torch.bool)
    begins[1:] = (held.diff() != 1) | (held[1:] == starts[1:])
    places = torch.arange(len(held)) + left * begins.cumsum(0)
    positions = torch.full((len(held) + left * int(begins.sum()),), NOWHERE)
    positions[places] = held
    back = torch.arange(-left, 0)
    before = held[begins, None] + back
    positions[places[begins, None] + back] = torch.where(before >= starts[begins, None], before, NOWHERE)
    return positions, places


def _others(positions: Tensor, layout: Layout, seq_len: int, world_size: int, rank: int) -> Tensor:
    """The positions that a rank wants and does not hold, ascending, each once."""
    wanted = torch.unique(positions[positions != NOWHERE])
    held = layout.positions(seq_len, world_size, rank)
    return wanted[~torch.isin(wanted, held)]


def _held(positions: Tensor, held: Tensor) -> Tensor:
    """The positions that are among those that a rank holds."""
    return positions[torch.isin(positions, held)]


def _place(positions: Tensor, held: Tensor) -> Tensor:
    """The index of each position in ``held``, which contains it."""
    return torch.searchsorted(held, positions)
