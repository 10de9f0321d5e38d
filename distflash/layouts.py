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


class Layout(ABC):
    """How a sequence is spread over ranks. A new layout is one frozen dataclass with one method, `ranges`."""

    @abstractmethod
    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        """The global positions that ``rank`` holds: disjoint ranges, each wholly before the next.

        Over all ranks they cover ``range(seq_len)`` exactly once.
        """

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
    """One run a rank. Fewest messages under windows and documents; unbalanced under a causal mask."""

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return (_chunk(rank, world_size, seq_len),)


@dataclass(frozen=True)
class Zigzag(Layout):
    """Chunks ``r`` and ``2W - 1 - r`` of ``2W``: balanced under a causal mask, with long runs for the kernels.

    The pairing is known from Llama 3's training report (https://arxiv.org/abs/2407.21783) and ring-flash-attn.
    """

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        early = _chunk(rank, 2 * world_size, seq_len)
        late = _chunk(2 * world_size - 1 - rank, 2 * world_size, seq_len)
        return (early, late)


@dataclass(frozen=True)
class Striped(Layout):
    """Every W-th token (https://arxiv.org/abs/2311.09431): balanced under any mask that is smooth in position."""

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return (range(rank, max(seq_len, rank), world_size),)


def _chunk(index: int, chunks: int, seq_len: int) -> range:
    return range(index * seq_len // chunks, (index + 1) * seq_len // chunks)
