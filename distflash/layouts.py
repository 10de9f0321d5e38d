"""Layouts: which global positions each rank holds.

A layout gives them as ascending Python ranges; positions, lengths and `count_below` follow from these. Lengths need not
be divisible by anything: shards of contiguous, zigzag and striped layouts differ by at most one token per range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.integers import set_count
from distflash.mask_algebra import Mask


class Layout(ABC):
    """How a sequence is sharded over ranks. A new layout is one frozen dataclass with one method, `ranges`.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Reversed(df.Layout):  # the first rank holds the end
        ...     def ranges(self, seq_len, world_size, rank):
        ...         return df.Contiguous().ranges(seq_len, world_size, world_size - 1 - rank)
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=Reversed())
        >>> cp.positions(8)
        tensor([4, 5, 6, 7])
    """

    @abstractmethod
    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        """The global positions that ``rank`` holds: disjoint ranges in ascending order.

        The ranges of all ranks cover ``range(seq_len)`` exactly once.
        """

    def under(self, mask: Mask) -> Layout:
        """The layout for a batch with this mask: itself, unless it depends on masks (`Balanced`)."""
        return self

    def refusal(self, seq_len: int) -> str | None:
        """Why the layout cannot shard ``seq_len`` tokens; None if it can."""
        return None

    def digest(self, seq_len: int, world_size: int) -> int:
        """An int by which ranks check that they computed the same ranges, such as a digest of them.

        0 if it is enough to compare the layouts' fields, as for all layouts but `Balanced`.
        """
        return 0

    def length(self, seq_len: int, world_size: int, rank: int) -> int:
        """How many tokens ``rank`` holds. It may be 0 where there are more ranks than tokens."""
        return sum(len(r) for r in self.ranges(seq_len, world_size, rank))

    def positions(self, seq_len: int, world_size: int, rank: int) -> Tensor:
        """int64 ``[length]`` on the CPU: the ascending global positions that ``rank`` holds."""
        parts = [torch.arange(r.start, r.stop, r.step) for r in self.ranges(seq_len, world_size, rank)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def count_below(self, positions: Tensor, seq_len: int, world_size: int, rank: int) -> Tensor:
        """How many of ``rank``'s tokens are before each global position.

        Since a rank's tokens ascend, its keys in the global interval ``[lo, hi)`` are its local keys
        ``[count_below(lo), count_below(hi))``.

        Args:
            positions: int64, any shape; clamped to ``[0, S]``.

        Returns:
            int64 of the same shape, non-decreasing in ``positions``.
        """
        count = torch.zeros_like(positions)
        for r in self.ranges(seq_len, world_size, rank):
            passed = torch.div(positions - r.start + r.step - 1, r.step, rounding_mode="floor")
            count += passed.clamp_(0, len(r))
        return count


@dataclass(frozen=True)
class Contiguous(Layout):
    """One range of tokens per rank. Fewest messages with windows and documents; unbalanced with causal masks.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Contiguous())
        >>> cp.positions(8)
        tensor([0, 1, 2, 3])
    """

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return (_chunk(rank, world_size, seq_len),)


@dataclass(frozen=True)
class Zigzag(Layout):
    """Chunks ``r`` and ``2W - 1 - r`` of ``2W``: balanced with a causal mask, and two ranges per rank.

    As in the Llama 3 report (https://arxiv.org/abs/2407.21783) and ring-flash-attn.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Zigzag())
        >>> cp.positions(8)
        tensor([0, 1, 6, 7])
    """

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        early = _chunk(rank, 2 * world_size, seq_len)
        late = _chunk(2 * world_size - 1 - rank, 2 * world_size, seq_len)
        return (early, late)


@dataclass(frozen=True)
class Striped(Layout):
    """Every W-th token (https://arxiv.org/abs/2311.09431): balanced with masks that change little from token to token.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Striped())
        >>> cp.positions(8)
        tensor([0, 2, 4, 6])
    """

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return (range(rank, max(seq_len, rank), world_size),)


@dataclass(frozen=True)
class WholeChunks(Layout):
    """``layout`` in units of ``chunk`` tokens instead of single tokens, so that no chunk is on two ranks.

    Args:
        layout: assigns chunks to ranks.
        chunk: tokens per chunk; the last chunk of a sequence may be shorter.

    Raises:
        ValueError: ``layout`` is no layout, or ``chunk`` is no int of at least 1.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.WholeChunks(df.Zigzag(), 3))
        >>> cp.positions(11)
        tensor([ 0,  1,  2,  9, 10])
    """

    layout: Layout
    chunk: int

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Layout) or isinstance(self.layout, WholeChunks):
            raise ValueError(f"WholeChunks(layout): expected another layout, such as df.Zigzag(), got {self.layout!r}")
        set_count(self, "chunk", least=1)

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        chunks = -(-seq_len // self.chunk)
        of_rank = self.layout.ranges(chunks, world_size, rank)
        runs = [range(n, n + 1) for r in of_rank for n in r] if any(r.step != 1 for r in of_rank) else of_rank
        return tuple(range(r.start * self.chunk, min(r.stop * self.chunk, seq_len)) for r in runs if len(r))


def _chunk(index: int, chunks: int, seq_len: int) -> range:
    return range(index * seq_len // chunks, (index + 1) * seq_len // chunks)
