"""The host's copy of a cache's metadata, whose lengths and counts are in device memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from distflash.exact import ByValue
from distflash.horizon import Horizon
from distflash.ledger import Ledger

# Horizons to cache, one per mask.
_MASKS = 4


@dataclass
class HostRecords:
    """The host's metadata of all sequences of a cache.

    Attributes:
        ledgers: which rank stores which keys; tokens of the last decoding steps may be missing.
        lengths: the length of each sequence in tokens.
        stale: whether replays of a CUDA graph may have appended tokens that the host has not counted.
        horizons: the mask bounds of future positions, by mask.
        keep: references to tensors that captured graphs read.
    """

    ledgers: list[Ledger]
    lengths: list[int]
    stale: bool = False
    horizons: dict[ByValue, Horizon] = field(default_factory=dict)
    keep: list[object] = field(default_factory=list)

    def remember(self, mask: ByValue, horizon: Horizon) -> None:
        """Cache a horizon. Only the last few masks are kept, since each step may have a new one."""
        self.horizons.pop(mask, None)
        while len(self.horizons) >= _MASKS:
            del self.horizons[next(iter(self.horizons))]
        self.horizons[mask] = horizon
