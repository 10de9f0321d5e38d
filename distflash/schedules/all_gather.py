"""All-gather: every rank receives the keys it needs directly from their source ranks, in a few chunks.

The first chunk is sent while a rank computes its local keys, each later one while it computes the chunk before. dK and
dV are sent back directly, and the source rank adds them in float32: a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from distflash.schedules.travel import KeysTravel


@dataclass(frozen=True)
class AllGather(KeysTravel):
    """Fewer and larger exchanges than `Ring`, with memory for a chunk of the remote keys.

    Args:
        chunks: the number of exchanges that the remote keys are divided into. With ``world_size - 1`` chunks, each is
            the keys of one rank.

    Raises:
        ValueError: chunks is not an int of at least 1.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, schedule=df.AllGather(chunks=1))
        >>> q, k, v = (torch.randn(1, 16, heads, 32) for heads in (4, 2, 2))
        >>> df.attention(q, k, v, mask=df.Causal(), cp=cp).shape
        torch.Size([1, 16, 4, 32])
    """

    chunks: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.chunks, int) or isinstance(self.chunks, bool) or self.chunks < 1:
            raise ValueError(f"AllGather(chunks): expected a number of exchanges, at least 1, got {self.chunks!r}")

    def sources(self, rank: int, world_size: int) -> tuple[tuple[int, ...], ...]:
        others = [(rank - n) % world_size for n in range(1, world_size)]
        chunks = min(self.chunks, len(others))
        cuts = [n * len(others) // max(1, chunks) for n in range(chunks + 1)]
        return ((rank,), *(tuple(others[a:b]) for a, b in pairwise(cuts)))
