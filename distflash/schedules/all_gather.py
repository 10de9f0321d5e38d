"""All-gather: every rank takes the keys it needs straight from their owners, in a few chunks.

The first chunk travels while a rank works on its own keys, each further one while it works on the chunk before. dK and
dV go back the same way and are added up in float32 by the keys' owner: a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from distflash.schedules.travel import KeysTravel


@dataclass(frozen=True)
class AllGather(KeysTravel):
    """Fewer and larger exchanges than `Ring`, and memory for a chunk of the other ranks' keys.

    Args:
        chunks: into how many exchanges the other ranks' keys are divided; with one less than there are ranks, each is
            the keys of one rank.

    Raises:
        ValueError: chunks is no int of at least 1.

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
