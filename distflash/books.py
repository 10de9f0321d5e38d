"""What the host knows of the sequences of a cache, beside what stands in device memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from distflash.exact import Exact
from distflash.horizon import Horizon
from distflash.ledger import Ledger

# Whose horizons are kept at a time.
_MASKS = 4


@dataclass
class Books:
    """What the host knows of all sequences of a cache.

    Attributes:
        ledgers: who keeps which keys; they may lag behind by tokens that have been dealt since.
        lengths: how many tokens each sequence has had.
        stale: whether steps may have run that the host does not know of, replays of a CUDA graph.
        horizons: what tokens to come see, by masks.
        keep: what captured graphs read.
    """

    ledgers: list[Ledger]
    lengths: list[int]
    stale: bool = False
    horizons: dict[Exact, Horizon] = field(default_factory=dict)
    keep: list[object] = field(default_factory=list)

    def remember(self, mask: Exact, horizon: Horizon) -> None:
        """Keep a horizon, and those of few other masks: each step may bring a new one."""
        self.horizons.pop(mask, None)
        while len(self.horizons) >= _MASKS:
            del self.horizons[next(iter(self.horizons))]
        self.horizons[mask] = horizon
