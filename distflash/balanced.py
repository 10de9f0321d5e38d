"""`Balanced`: a layout that is computed from a mask, so that all ranks have equal work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from distflash.assignment import Aim, Piece, assign
from distflash.exact import code
from distflash.integers import set_count
from distflash.layouts import Layout
from distflash.mask_algebra import Mask
from distflash.rows import Rows
from distflash.workload import Workload

# The aims that are tried, in this order. Each gives one assignment. ``Aim(limit, enough)``: each rank should have at
# most ``limit * mean`` pairs, and at least ``enough * limit * mean``. With more than _FEW_RANKS ranks the first
# balanced assignment is taken. Otherwise an assignment takes little time, so the assignments of all aims are made, and
# the balanced one that sends the fewest keys is taken.
AIMS = tuple(Aim(limit, enough) for limit in (1.049, 1.03, 1.015) for enough in (0.95, 0.9))
_FEW_RANKS = 16
# An assignment is balanced if no rank has more than this multiple of the mean number of pairs.
_BALANCED = 1.05


@dataclass(frozen=True)
class Balanced(Layout):
    """All ranks have the same number of tokens and nearly the same number of allowed pairs, and few keys are sent.

    Short documents stay on one rank, long ones are divided. Every rank computes the same assignment from the mask,
    without communication. If the mask differs from batch to batch, use ``df.Balanced()`` without a mask, and
    `ContextParallel.with_mask` for each batch.

    Args:
        mask: the mask whose work is balanced, usually ``Causal() & Documents(cu_seqlens)``. Attention with any other
            mask is correct, but less well balanced.
        chunk: the sequence is cut into blocks of so many tokens, from position 0. Documents that start in the same
            block are assigned as if they were one document. With larger chunks the assignment takes less time.
        tokens: "equal": the numbers of tokens of ranks differ by at most one. A number: what a token costs outside of
            attention (projections, MLP), in pairs. Then the ranks have nearly equal costs (their pairs, plus this
            number times their tokens) and different numbers of tokens. For a layer with P parameters, H heads and head
            dim D it is ``P / (2 * H * D)``: 2 P FLOPs a token over 4 H D FLOPs a pair.

    Raises:
        ValueError: an argument has the wrong type.

    Examples:
        >>> mask = df.Causal() & df.Documents([0, 3, 8])
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Balanced(mask, chunk=1))
        >>> cp.positions(8)
        tensor([0, 1, 2, 7])
    """

    mask: Mask | None = None
    chunk: int = 512
    tokens: Literal["equal"] | float = "equal"
    # The assignments computed so far, by (number of tokens, number of ranks).
    _deals: dict[tuple[int, int], Deal] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(f"mask: expected a Mask such as df.Causal(), or None, got {self.mask!r}")
        set_count(self, "chunk", least=1)
        number = isinstance(self.tokens, int | float) and not isinstance(self.tokens, bool)
        if self.tokens != "equal" and not (number and 0 <= self.tokens < float("inf")):  # type: ignore[operator]
            raise ValueError(
                f'tokens: expected "equal", or what a token costs in allowed pairs, at least 0, got {self.tokens!r}'
            )

    def under(self, mask: Mask) -> Balanced:
        return Balanced(mask, self.chunk, self.tokens)

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return self._deal(seq_len, world_size).ranges[rank]

    def length(self, seq_len: int, world_size: int, rank: int) -> int:
        return self._deal(seq_len, world_size).lengths[rank]

    def count_below(self, positions: Tensor, seq_len: int, world_size: int, rank: int) -> Tensor:
        return self._deal(seq_len, world_size).count_below(positions, rank)

    def _deal(self, seq_len: int, world_size: int) -> Deal:
        if (seq_len, world_size) not in self._deals:
            self._deals[seq_len, world_size] = self._new_deal(seq_len, world_size)
        return self._deals[seq_len, world_size]

    def refusal(self, seq_len: int) -> str | None:
        if self.mask is None:
            return (
                "layout: Balanced() needs a mask, by which it assigns tokens to ranks; for each batch make batch_cp = "
                "cp.with_mask(mask), and use it to shard the batch and in attention; or give df.Balanced(mask)"
            )
        if self.mask.seq_len not in (None, seq_len):
            return (
                f"layout: Balanced is for a mask of {self.mask.seq_len} tokens, not for {seq_len}; take "
                "cp.with_mask(mask) with the mask of this batch"
            )
        return None

    def digest(self, seq_len: int, world_size: int) -> int:
        return self._deal(seq_len, world_size).digest

    def _new_deal(self, seq_len: int, world_size: int) -> Deal:
        if (problem := self.refusal(seq_len)) is not None:
            raise ValueError(problem)
        assert self.mask is not None
        masks = self.mask.masks if isinstance(self.mask, Rows) else (self.mask,)
        work = Workload.of(masks, seq_len, self.chunk)
        shares = None
        if self.tokens == "equal":
            shares = [(r + 1) * seq_len // world_size - r * seq_len // world_size for r in range(world_size)]
        else:
            work = work.with_token_cost(float(self.tokens))
        return Deal.of(best(work, shares, world_size, self.chunk))


def best(work: Workload, shares: Sequence[int] | None, ranks: int, chunk: int) -> list[list[Piece]]:
    """Each rank's pieces ``(start, stop)``, chosen as `AIMS` says; the most balanced ones, if none are balanced."""
    found = []
    for held, pairs_of_busiest in assign(work, shares, ranks, AIMS, chunk):
        total = work.before(work.seq_len)
        excess = max(0.0, pairs_of_busiest * ranks - _BALANCED * total)
        if ranks > _FEW_RANKS and not excess:
            return held
        found.append((excess, sum(map(work.moved, held)), held))
    return min(found, key=lambda each: each[:2])[2]


@dataclass(frozen=True)
class Deal:
    """An assignment of tokens to ranks.

    Attributes:
        ranges: by rank, ascending and disjoint.
        lengths: by rank, the number of tokens.
    """

    ranges: tuple[tuple[range, ...], ...]
    lengths: tuple[int, ...]

    @staticmethod
    def of(held: Sequence[Sequence[Piece]]) -> Deal:
        ranges = tuple(tuple(range(*piece) for piece in pieces) for pieces in held)
        return Deal(ranges, tuple(sum(map(len, runs)) for runs in ranges))

    @cached_property
    def digest(self) -> int:
        """A digest that differs between different assignments."""
        return code(tuple((run.start, run.stop) for runs in self.ranges for run in (*runs, range(-1, -1))))

    @cached_property
    def _edges(self) -> list[tuple[Tensor, Tensor]]:
        """For each rank, two int64 tensors: where its ranges start; how many of its tokens are in earlier ranges.
        The second has another element at the end, the number of all tokens of the rank.

        Views of two tensors, since making two tensors for each of many ranks takes longer than everything else.
        """
        starts = torch.tensor([run.start for runs in self.ranges for run in runs], dtype=torch.int64)
        counts = [count for runs in self.ranges for count in accumulate(map(len, runs), initial=0)]
        sizes = list(map(len, self.ranges))
        before = torch.tensor(counts, dtype=torch.int64).split([size + 1 for size in sizes])
        return list(zip(starts.split(sizes), before, strict=True))

    def count_below(self, positions: Tensor, rank: int) -> Tensor:
        """See `Layout.count_below`."""
        if not self.ranges[rank]:
            return torch.zeros_like(positions)
        starts, before = (edges.to(positions.device) for edges in self._edges[rank])
        run = (torch.searchsorted(starts, positions.contiguous(), right=True) - 1).clamp_min(0)
        return torch.minimum(before[run] + (positions - starts[run]).clamp_min(0), before[run + 1])
