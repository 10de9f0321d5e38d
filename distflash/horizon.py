"""Horizons: the mask bounds of future positions, computed once and kept on the device for all decoding steps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.chunks import length_for
from distflash.geometry import MOST_PARTS, require_ends
from distflash.kernels.decoding import Table
from distflash.ledger import Ledger
from distflash.mask_algebra import Ends, Mask
from distflash.rows import Rows


@dataclass(frozen=True, eq=False)
class Horizon:
    """The mask bounds of the positions that decoding steps may reach.

    Attributes:
        mask: of the whole sequence.
        ends: the bounds, int32 ``[R, 2, P, N]`` on the CPU, see `Table`.
        table: the same on the device, for the kernel.
        limit: the first position after the table, or after the end of the mask.
        ahead: for each mask, the positions whose queries see later keys, as ascending ranges.
    """

    mask: Mask
    ends: Tensor
    table: Table
    limit: int
    ahead: tuple[tuple[range, ...], ...]

    @staticmethod
    def of(mask: Mask, start: int, count: int, device: torch.device) -> Horizon:
        """The bounds of ``count`` positions from ``start`` on.

        Raises:
            ValueError: the mask's bounds violate the contract of `Mask.ends`.
        """
        masks = mask.masks if isinstance(mask, Rows) else (mask,)
        stop = max(start, min(start + count, *map(length_for, masks)))
        positions = torch.arange(start, stop)
        parts = [_parts(each, positions) for each in masks]
        ends = torch.zeros(len(masks), 2, max(map(len, parts)), count, dtype=torch.int32)
        ahead = []
        for row, of_row in zip(ends, parts, strict=True):
            far = torch.zeros(len(positions), dtype=torch.bool)
            for n, (lo, hi) in enumerate(of_row):
                row[0, n, : len(lo)], row[1, n, : len(hi)] = lo, hi
                far |= (hi > lo) & (hi > positions + 1)
            ahead.append(_runs(positions[far]))
        return Horizon(mask, ends, Table(start, ends.to(device)), stop, tuple(ahead))

    def covers(self, first: int, stop: int) -> bool:
        """Whether positions ``first`` to ``stop`` are in the table."""
        return self.table.start <= first and stop <= self.table.start + self.ends.shape[3]

    def refusal(self, lengths: tuple[int, ...], tokens: int) -> str | None:
        """Why ``tokens`` cannot be appended to sequences of these lengths; None if they can."""
        if max(lengths) + tokens > self.limit:
            return (
                f"mask: {self.mask!r} is for a sequence of {self.limit} tokens, but with this call a sequence of the "
                f"cache has {max(lengths) + tokens}; make a mask of the whole sequence, tokens to come included"
            )
        for row, length in enumerate(lengths):
            ahead = self.ahead[min(row, len(self.ahead) - 1)]
            first = bisect_right(ahead, length, key=_stop)
            if first < len(ahead) and ahead[first].start < length + tokens:
                return (
                    f"mask: {self.mask!r} lets the token at {max(length, ahead[first].start)} see keys that come after "
                    "it; in decoding a token sees what is there: pass mask=df.Causal(), or this mask & df.Causal()"
                )
        return None

    def needs_dropped(self, row: int, ledger: Ledger, length: int, tokens: int) -> bool:
        """Whether one of the next ``tokens`` of a sequence of this length sees a key that has been dropped."""
        if sum(ledger.counts) == ledger.total:
            return False
        at = slice(length - self.table.start, length - self.table.start + tokens)
        lo, hi = self.ends[min(row, len(self.ends) - 1), :, :, at].clamp_max(ledger.total).long()
        ranks = range(ledger.world_size)
        kept = sum(ledger.count_below(hi, rank) - ledger.count_below(lo, rank) for rank in ranks)
        return bool((kept < hi - lo).any())


def _parts(mask: Mask, positions: Tensor) -> tuple[Ends, ...]:
    """The mask's bounds, clamped to its positions; an empty interval has ``lo == hi``."""
    parts = mask.parts(positions, length_for(mask))
    if len(parts) > MOST_PARTS:
        raise ValueError(f"mask: {mask!r} gives {len(parts)} intervals of keys; expected at most {MOST_PARTS}")
    for lo, hi in parts:
        require_ends(mask, positions, lo, hi)
    clamped = [(lo.clamp(0, length_for(mask)), hi.clamp(0, length_for(mask))) for lo, hi in parts]
    return tuple((lo, torch.maximum(lo, hi)) for lo, hi in clamped)


def _runs(positions: Tensor) -> tuple[range, ...]:
    """Ascending positions as ranges of consecutive ones."""
    starts = torch.cat([positions[:1], positions[1:][positions.diff() > 1]])
    stops = torch.cat([positions[:-1][positions.diff() > 1], positions[-1:]]) + 1
    return tuple(range(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))


def _stop(run: range) -> int:
    return run.stop
