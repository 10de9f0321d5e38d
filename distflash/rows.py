"""A mask for each sequence of a batch, for batches whose sequences are packed differently.

Kernels and schedules do not know of it. The sequences (rows of the batch) are concatenated to one, in which row r's
token at position p is at ``r * S + p``, and the row's mask is shifted by ``r * S``: the rows are documents of the long
sequence. The bounds of row r are in ``[r * S, (r + 1) * S]``, so they do not decrease from one row to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from distflash.geometry import Folded, Geometry, Tokens, require_ends
from distflash.mask_algebra import And, Ends, Mask, Or


@dataclass(frozen=True)
class Rows(Mask):
    """A mask for each sequence of the batch: the sequence ``q[n]`` attends to ``k[n]`` under ``masks[n]``.

    ``&`` and ``|`` combine it row by row, with another `Rows` of the same number of masks or with one mask for all
    rows. It is computed as one sequence of B * S tokens, with as many passes as the row with the most parts needs.

    Args:
        masks: one mask for each sequence, as many as the batch has.

    Raises:
        ValueError: an element is not a mask or is a `Rows`, or two masks are for different lengths.

    Examples:
        >>> mask = df.Causal() & df.Rows([df.Documents([0, 2, 4]), df.Documents([0, 4])])
        >>> i = torch.arange(4)
        >>> mask.materialize(i, i).int()
        tensor([[[1, 0, 0, 0],
                 [1, 1, 0, 0],
                 [0, 0, 1, 0],
                 [0, 0, 1, 1]],
        <BLANKLINE>
                [[1, 0, 0, 0],
                 [1, 1, 0, 0],
                 [1, 1, 1, 0],
                 [1, 1, 1, 1]]], dtype=torch.int32)
    """

    masks: tuple[Mask, ...]

    def __init__(self, masks: Sequence[Mask]) -> None:
        if isinstance(masks, Mask) or not isinstance(masks, Iterable):
            raise ValueError(
                f"Rows(masks): expected a sequence of masks, one for each sequence of the batch, got {masks!r}; a mask "
                "for all of them is passed as it is"
            )
        masks = tuple(masks)
        for n, mask in enumerate(masks):
            if not isinstance(mask, Mask) or isinstance(mask, Rows):
                raise ValueError(
                    f"Rows(masks): expected a mask for each sequence of the batch, but masks[{n}] is {mask!r}"
                )
        object.__setattr__(self, "masks", masks)
        # While compiling, lengths are not known yet; the call makes the mask again.
        if not torch.compiler.is_compiling():
            self._require_one_length()

    @property
    def seq_len(self) -> int | None:
        """The length of every row, if any of the masks knows it, otherwise None."""
        return next((mask.seq_len for mask in self.masks if mask.seq_len is not None), None)

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        """Not available, since each row has bounds of its own.

        Raises:
            TypeError: always. Use the masks of the rows, ``masks[n]``.
        """
        raise TypeError(f"{self!r} has a mask for each sequence of the batch; use masks[n].parts(positions, seq_len)")

    def jumps(self, seq_len: int) -> Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int64), *(mask.jumps(seq_len) for mask in self.masks)])

    def materialize(self, q_positions: Tensor, k_positions: Tensor, seq_len: int | None = None) -> Tensor:
        """The masks of all rows as a dense boolean ``[rows, n_q, n_k]``; see `Mask.materialize`."""
        seq_len = self.seq_len if seq_len is None else seq_len
        of_rows = [mask.materialize(q_positions, k_positions, seq_len) for mask in self.masks]
        if not of_rows:
            return torch.zeros(0, len(q_positions), len(k_positions), dtype=torch.bool, device=q_positions.device)
        return torch.stack(of_rows)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Rows([a & b for a, b in self._beside(other)])

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Rows([a | b for a, b in self._beside(other)])

    def after(self, first: Mask, operation: type[And] | type[Or]) -> Mask:
        return Rows([operation(first, mask) for mask in self.masks])

    def _beside(self, other: Mask) -> list[tuple[Mask, Mask]]:
        """Each row's mask with the mask that it is combined with."""
        if not isinstance(other, Rows):
            return [(mask, other) for mask in self.masks]
        if len(self.masks) != len(other.masks):
            raise ValueError(
                f"mask: the two sides of & or | have masks for {len(self.masks)} and for {len(other.masks)} sequences; "
                "expected as many on both sides, one for each sequence of the batch"
            )
        return list(zip(self.masks, other.masks, strict=True))

    def _require_one_length(self) -> None:
        known = [(mask.seq_len, n) for n, mask in enumerate(self.masks) if mask.seq_len is not None]
        for length, n in known:
            if length != known[0][0]:
                raise ValueError(
                    f"Rows(masks): masks[{known[0][1]}] is for sequences of {known[0][0]} tokens and masks[{n}] of "
                    f"{length}; all sequences of a batch have one length, padding included, so both cu_seqlens must "
                    "end at the same S"
                )


@dataclass(frozen=True)
class EndToEnd(Mask):
    """The masks of all rows as one mask of the concatenated sequence.

    Attributes:
        rows: the masks.
        length: S, of each row.
    """

    rows: Rows
    length: int

    def __repr__(self) -> str:
        return repr(self.rows)

    @property
    def seq_len(self) -> int:
        return len(self.rows.masks) * self.length

    def parts(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        """Part n consists of the n-th part of every row. Rows with fewer parts have empty intervals in it."""
        starts = [row * self.length for row in range(len(self.rows.masks))]
        cuts = torch.searchsorted(positions, torch.tensor([*starts, seq_len])).tolist()
        own = [positions[start:stop] for start, stop in pairwise(cuts)]
        of_rows = [self._parts_of(*row) for row in zip(self.rows.masks, own, starts, strict=True)]
        empty = [(nothing, nothing) for nothing in map(torch.full_like, own, starts)]
        by_part = zip_longest(*of_rows)
        parts = [[ends or none for ends, none in zip(part, empty, strict=True)] for part in by_part]
        return tuple(_joined(part) for part in parts) or ((positions, positions),)

    def _parts_of(self, mask: Mask, positions: Tensor, start: int) -> list[Ends]:
        """One row's parts, shifted to its start, and clamped, since other rows' keys are before and after it."""
        within = positions - start
        parts = mask.parts(within, self.length)
        for lo, hi in parts:
            require_ends(mask, within, lo, hi)
        return [(lo.clamp(0, self.length) + start, hi.clamp(0, self.length) + start) for lo, hi in parts]


def geometry_of(mask: Mask, queries: Tokens, keys: Tokens, seq_len: int) -> Geometry:
    """Queries and keys, of ``seq_len`` positions each sequence, under a mask that may be `Rows`."""
    if not isinstance(mask, Rows):
        return Geometry(mask, queries, keys, seq_len)
    rows = len(mask.masks)
    folded = Folded(queries, seq_len, rows)
    others = folded if keys is queries else Folded(keys, seq_len, rows)
    return Geometry(EndToEnd(mask, seq_len), folded, others, rows * seq_len)


def _joined(parts: list[Ends]) -> Ends:
    return torch.cat([lo for lo, _ in parts]), torch.cat([hi for _, hi in parts])
