"""Which tile sizes each kernel runs with: a table that is shipped, tuned offline by ``tools/tune_triton.py``.

Nothing is tuned at run time: ranks that time candidates for themselves come to different choices, and skew each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """``block_m`` queries by ``block_n`` keys a step, for ``num_warps`` warps, with ``num_stages`` loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile for each pass."""

    forward: Tile
    dkdv: Tile
    dq: Tile


# Families: "sm_90" (227 KB of shared memory), "sm_100", "sm_80" (163 KB), "sm_86" (consumer cards: 99 KB), "gfx942"
# (64 KB), "interpreter". Rows: the larger padded head dim up to which a row is for.
_HALF: dict[str, dict[int, Tiles]] = {
    "sm_90": {
        64: Tiles(forward=Tile(128, 64, 4, 3), dkdv=Tile(64, 64, 4, 3), dq=Tile(64, 128, 4, 3)),
        128: Tiles(forward=Tile(64, 64, 4, 3), dkdv=Tile(64, 64, 4, 2), dq=Tile(128, 64, 8, 4)),
        256: Tiles(forward=Tile(128, 64, 8, 2), dkdv=Tile(32, 64, 8, 2), dq=Tile(64, 64, 8, 2)),
    },
    "sm_100": {
        64: Tiles(forward=Tile(128, 128, 8, 3), dkdv=Tile(64, 128, 8, 3), dq=Tile(128, 64, 8, 3)),
        128: Tiles(forward=Tile(128, 128, 8, 2), dkdv=Tile(64, 128, 8, 2), dq=Tile(128, 64, 8, 2)),
        256: Tiles(forward=Tile(128, 64, 8, 2), dkdv=Tile(64, 64, 8, 1), dq=Tile(64, 64, 8, 1)),
    },
    "sm_80": {
        64: Tiles(forward=Tile(128, 64, 4, 3), dkdv=Tile(64, 64, 4, 2), dq=Tile(64, 64, 4, 2)),
        128: Tiles(forward=Tile(128, 64, 8, 2), dkdv=Tile(64, 64, 8, 2), dq=Tile(64, 64, 8, 2)),
        256: Tiles(forward=Tile(64, 32, 8, 2), dkdv=Tile(32, 64, 8, 1), dq=Tile(64, 32, 8, 1)),
    },
    "sm_86": {
        64: Tiles(forward=Tile(128, 64, 4, 2), dkdv=Tile(64, 64, 4, 2), dq=Tile(64, 64, 4, 2)),
        128: Tiles(forward=Tile(64, 64, 4, 2), dkdv=Tile(32, 64, 4, 2), dq=Tile(64, 32, 4, 2)),
        256: Tiles(forward=Tile(64, 32, 8, 1), dkdv=Tile(32, 32, 4, 1), dq=Tile(32, 32, 4, 1)),
    },
    "gfx942": {
        64: Tiles(forward=Tile(128, 64, 4, 1), dkdv=Tile(64, 64, 4, 1), dq=Tile(64, 64, 4, 1)),
        128: Tiles(forward=Tile(128, 32, 4, 1), dkdv=Tile(32, 64, 4, 1), dq=Tile(64, 32, 4, 1)),
        256: Tiles(forward=Tile(64, 16, 4, 1), dkdv=Tile(16, 32, 4, 1), dq=Tile(32, 16, 4, 1)),
    },
    "interpreter": {
        256: Tiles(forward=Tile(64, 64, 4, 1), dkdv=Tile(64, 64, 4, 1), dq=Tile(64, 64, 4, 1)),
    },
}
# float32 products run on the ordinary cores, exactly: smaller tiles.
_SINGLE: dict[int, Tiles] = {
    64: Tiles(forward=Tile(32, 32, 4, 2), dkdv=Tile(32, 32, 4, 2), dq=Tile(32, 32, 4, 2)),
    128: Tiles(forward=Tile(32, 32, 8, 1), dkdv=Tile(32, 32, 8, 1), dq=Tile(32, 32, 4, 2)),
    256: Tiles(forward=Tile(16, 16, 4, 1), dkdv=Tile(16, 16, 4, 1), dq=Tile(16, 16, 4, 1)),
}
FAMILIES = tuple(_HALF)
# Under dropout: where the random numbers of a tile as above do not fit into registers.
_HALF_OF_DROPOUT: dict[str, dict[int, dict[str, Tile]]] = {
    "sm_90": {64: dict(forward=Tile(64, 64, 4, 3), dq=Tile(64, 64, 4, 3)), 128: dict(dkdv=Tile(32, 64, 4, 2))},
    "sm_80": {
        64: dict(dkdv=Tile(32, 64, 4, 2), dq=Tile(64, 32, 4, 2)),
        128: dict(forward=Tile(64, 64, 4, 2), dkdv=Tile(32, 64, 8, 2)),
    },
}


def choose(family: str, itemsize: int, d_padded: int, has_dropout: bool = False) -> Tiles:
    """The shipped tiles for a device family, 2- or 4-byte elements, and the larger padded head dim."""
    is_half = itemsize == 2 or family == "interpreter"
    rows = _HALF[family] if is_half else _SINGLE
    row = min(d for d in rows if d >= d_padded)
    others = _HALF_OF_DROPOUT.get(family, {}).get(row, {}) if is_half and has_dropout else {}
    return replace(rows[row], **others)
