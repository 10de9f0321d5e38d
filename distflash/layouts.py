"""Layouts: which global positions each rank holds.

A layout answers one question with Python ranges, in ascending order. From them follow the positions, how many
tokens a rank holds, and `count_below`, which turns a global interval of keys into a local one by arithmetic.
Lengths need not divide by anything: shards differ by at most a token per range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.masks import Mask


class Layout(ABC):
    """How a sequence is spread over ranks. A new layout is one frozen dataclass with one method, `ranges`.

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
        """The global positions that ``rank`` holds: disjoint ranges, each wholly before the next.

        Over all ranks they cover ``range(seq_len)`` exactly once.
        """

    def under(self, mask: Mask) -> Layout:
        """The layout for a batch that is attended to under ``mask``: itself, unless it is made for a mask."""
        return self

    def refusal(self, seq_len: int) -> str | None:
        """Why the layout cannot say who holds which of so many tokens; None if it can."""
        return None

    def fingerprint(self, seq_len: int, world_size: int) -> int:
        """What ranks compare beside the layout itself: a digest of what each rank holds where that is computed from
        much; else 0.
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
        """How many of ``rank``'s tokens lie before each global position.

        Since a rank's tokens ascend, the global interval of keys ``[lo, hi)`` is the local interval
        ``[count_below(lo), count_below(hi))`` of that rank's keys.

        Args:
            positions: int64, any shape; positions outside ``[0, S]`` count as the nearer end.

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
    """One run a rank. Fewest messages under windows and documents; unbalanced under a causal mask.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Contiguous())
        >>> cp.positions(8)
        tensor([0, 1, 2, 3])
    """

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return (_chunk(rank, world_size, seq_len),)


@dataclass(frozen=True)
class Zigzag(Layout):
    """Chunks ``r`` and ``2W - 1 - r`` of ``2W``: balanced under a causal mask, with long runs for the kernels.

    The pairing is known from Llama 3's training report (https://arxiv.org/abs/2407.21783) and ring-flash-attn.

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
    """Every W-th token (https://arxiv.org/abs/2311.09431): balanced under any mask that is smooth in position.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Striped())
        >>> cp.positions(8)
        tensor([0, 2, 4, 6])
    """

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return (range(rank, max(seq_len, rank), world_size),)


def _chunk(index: int, chunks: int, seq_len: int) -> range:
    return range(index * seq_len // chunks, (index + 1) * seq_len // chunks)
