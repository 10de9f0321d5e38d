"""The host's records of a cache's sequences, beside the counts and lengths in device memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from distflash.exact import Exact
from distflash.horizon import Horizon
from distflash.ledger import Ledger

# Horizons kept, one for each mask.
_MASKS = 4


@dataclass
class Books:
    """The host's records of all sequences of a cache.

    Attributes:
        ledgers: which rank stores which keys; tokens of later decoding steps may be missing.
        lengths: the length of each sequence in tokens.
        stale: whether replays of a CUDA graph may have appended tokens that the host has not counted.
        horizons: the mask bounds of positions to come, by masks.
        keep: references to what captured graphs read.
    """

    ledgers: list[Ledger]
    lengths: list[int]
    stale: bool = False
    horizons: dict[Exact, Horizon] = field(default_factory=dict)
    keep: list[object] = field(default_factory=list)

    def remember(self, mask: Exact, horizon: Horizon) -> None:
        """Keep a horizon and those of the last masks, since each step may have a new mask."""
        self.horizons.pop(mask, None)
        while len(self.horizons) >= _MASKS:
            del self.horizons[next(iter(self.horizons))]
        self.horizons[mask] = horizon
