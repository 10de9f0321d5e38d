"""What a mask is, a pair of monotone bounds, and how masks are combined.

The query at global position ``i`` sees one interval of keys, ``lo(i) <= j < hi(i)``, and neither bound decreases as
``i`` grows. The rest of the package (skipping ring steps, dividing tiles into full and masked ones, the transpose for
the keys' backward) relies on these two facts; see ``docs/math.md``.

A union ``a | b`` is several such pairs with no key in common (`Mask.parts`). The part of ``b`` outside ``a`` is
``[lo_b, min(hi_b, lo_a))`` and ``[max(lo_b, hi_a), hi_b)``. Minimum and maximum of non-decreasing functions are
non-decreasing, so unions and intersections of unions are unions of such pairs again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Never

import torch
from torch import Tensor

from distflash import pictures
from distflash.integers import FAR

# ``(lo, hi)``, int64 ``[n]`` each: for each of n queries, the bounds of its interval of keys.
Ends = tuple[Tensor, Tensor]


class Mask:
    """Which keys a query may see.

    Combine masks with ``&`` (a pair is allowed where both allow it) and ``|`` (where either allows it).

    A new mask is one frozen dataclass with one method: `ends`, or `parts` if a query sees several intervals.

    Attributes:
        graph_inputs: for torch.compile, the mask's fields in order, as int64 tensors on the CPU. They become graph
            inputs, so a change does not recompile. If None, int fields become graph inputs; a tuple field of a new
            length recompiles.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Lookahead(df.Mask):  # causal, plus the next n tokens
        ...     n: int
        ...     def ends(self, positions, seq_len):
        ...         return torch.zeros_like(positions), positions + 1 + self.n
        >>> i = torch.arange(5)
        >>> (Lookahead(1) & df.Window(1, 1)).materialize(i, i).int()
        tensor([[1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [0, 1, 1, 1, 0],
                [0, 0, 1, 1, 1],
                [0, 0, 0, 1, 1]], dtype=torch.int32)
    """

    graph_inputs: tuple[Tensor, ...] | None = None

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        """The bounds of each query's interval of keys, ``lo <= j < hi``.

        Args:
            positions: int64 ``[n]``, ascending global positions of queries.
            seq_len: the global sequence length ``S``.

        Returns:
            ``(lo, hi)``, int64 ``[n]`` each, both non-decreasing. They may be outside ``[0, S)`` and an interval may be
            empty (``hi <= lo``): the caller clamps them. Bounds that decrease or have overflowed int64 raise.

        Raises:
            TypeError: a query sees several intervals under this mask. Use `parts`.
        """
        raise TypeError(f"{self!r} gives a query several intervals of keys; use parts(positions, seq_len)")

    def parts(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        """Pairs of bounds as `ends` returns them, with no key in common. A query sees the keys of all pairs.

        Args:
            positions: int64 ``[n]``, ascending global positions of queries.
            seq_len: the global sequence length ``S``.
        """
        return (self.ends(positions, seq_len),)

    def cover(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        """The same keys as `parts`, not simplified: intervals may overlap, and empty ones may have ``hi < lo``.

        All queries have equally many intervals. So the union of their ``[lo[0], hi[-1])`` contains every key that a
        query between the first and the last position sees.
        """
        return self.parts(positions, seq_len)

    def jumps(self, seq_len: int) -> Tensor:
        """The positions at which the visible keys may change abruptly, such as the starts of packed documents.

        int64 ``[n]`` on the CPU, in any order. `Balanced` counts the pairs of the queries on both sides of each. If a
        mask omits some, results are the same, but ranks are less well balanced.
        """
        return torch.empty(0, dtype=torch.int64)

    @property
    def seq_len(self) -> int | None:
        """The global sequence length, if the mask knows it (as `Documents` does), otherwise None."""
        return None

    def materialize(self, q_positions: Tensor, k_positions: Tensor, seq_len: int | None = None) -> Tensor:
        """The mask as a dense boolean ``[n_q, n_k]``, True where the query sees the key; for tests and small examples.

        Args:
            q_positions: int64 ``[n_q]`` global positions of queries, in any order.
            k_positions: int64 ``[n_k]`` global positions of keys, in any order.
            seq_len: the global length; by default one past the largest position given.
        """
        if seq_len is None:
            seq_len = self.seq_len
        if seq_len is None:
            last = max(int(p.max()) if p.numel() else -1 for p in (q_positions, k_positions))
            seq_len = last + 1
        order = q_positions.argsort()
        seen = [
            (k_positions >= lo[:, None]) & (k_positions < hi[:, None])
            for lo, hi in self.parts(q_positions[order], seq_len)
        ]
        return torch.stack(seen).any(0)[order.argsort()]

    def plot(
        self, seq_len: int | None = None, layout: pictures.Placed | None = None, world_size: int = 1, ax: Any = None
    ) -> Any:
        """Draw the mask with matplotlib: rows are queries, columns are keys, colours the ranks that hold the queries.

        Above 512 tokens the picture is a grid of 512 x 512 cells; the more of a cell's pairs are allowed, the darker it
        is. The legend gives each rank's share of the allowed pairs. Strips at the left and at the bottom show which
        rank holds the queries and the keys.

        Args:
            seq_len: the global length S; may be left out where the mask knows it.
            layout: which positions each rank holds, a `Layout`. May be left out for one rank.
            world_size: the number of ranks.
            ax: the matplotlib Axes to draw on; None for those of a new figure.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an argument is missing or has the wrong type, or ``seq_len`` is not the mask's.
        """
        return pictures.plot(self, seq_len, layout, world_size, ax)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return other.after(self, And)

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return other.after(self, Or)

    def after(self, first: Mask, operation: type[And] | type[Or]) -> Mask:
        """Combine ``first`` with this mask by `And` or `Or`. `Rows` combines each of its masks."""
        return operation(first, self)

    def __bool__(self) -> Never:
        # Python's `a and b` is b: without this error, a would be ignored silently.
        raise ValueError(
            f"mask: {self!r} has no truth value; combine masks with `a & b` or `a | b`, not `a and b` or `a or b`, and "
            "test for a missing one with `mask is None`"
        )


@dataclass(frozen=True)
class _Pair(Mask):
    """Two masks combined.

    Raises:
        ValueError: the two sides are for different lengths.
    """

    first: Mask
    second: Mask
    _sign: ClassVar[str]

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # lengths are not known yet; the call makes the mask again
            return
        a, b = self.first.seq_len, self.second.seq_len
        if a is not None and b is not None and a != b:
            raise ValueError(
                f"mask: the two sides of {self._sign} are for different lengths, {a} and {b}; "
                "both cu_seqlens must end at the same S"
            )

    def jumps(self, seq_len: int) -> Tensor:
        return torch.cat([self.first.jumps(seq_len), self.second.jumps(seq_len)])

    @property
    def seq_len(self) -> int | None:
        return self.second.seq_len if self.first.seq_len is None else self.first.seq_len


@dataclass(frozen=True)
class And(_Pair):
    """Both masks at once: the larger ``lo`` and the smaller ``hi``. Written ``a & b``."""

    _sign: ClassVar[str] = "&"

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        return _both(self.first.ends(positions, seq_len), self.second.ends(positions, seq_len))

    def parts(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        pairs = product(self.first.parts(positions, seq_len), self.second.parts(positions, seq_len))
        return _tidy([_both(a, b) for a, b in pairs])

    def cover(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        pairs = product(self.first.cover(positions, seq_len), self.second.cover(positions, seq_len))
        return tuple(_both(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Or(_Pair):
    """Either mask. Written ``a | b``. A key that both allow counts once."""

    _sign: ClassVar[str] = "|"

    def parts(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        first = _tidy(list(self.first.parts(positions, seq_len)))
        rest = _tidy(list(self.second.parts(positions, seq_len)))
        for a in first:
            rest = _tidy([outside for b in rest for outside in _less(b, a)])
        return _tidy([*first, *rest])

    def cover(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        return (*self.first.cover(positions, seq_len), *self.second.cover(positions, seq_len))


def _both(a: Ends, b: Ends) -> Ends:
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def _less(b: Ends, a: Ends) -> tuple[Ends, Ends]:
    """The parts of ``b`` before and after the intervals of ``a``. Empty intervals of ``a`` must have ``lo == hi``."""
    return (b[0], torch.minimum(b[1], a[0])), (torch.maximum(b[0], a[1]), b[1])


def _tidy(parts: list[Ends]) -> tuple[Ends, ...]:
    """The same keys in fewer parts: empty ones are dropped, and those that are adjacent in every row are joined.

    At least one part is returned. An empty interval has ``lo == hi``. Bounds that have overflowed stay unchanged, and
    raise later (`geometry.require_ends`).
    """
    kept: list[Ends] = []
    for lo, hi in parts:
        if wrapped(lo, hi):
            kept.append((lo, hi))
            continue
        part = lo, torch.maximum(lo, hi)
        if bool((part[0] == part[1]).all()):
            continue
        for n, other in enumerate(kept):
            joined = _joined(other, part)
            if joined is not None:
                kept[n] = joined
                break
        else:
            kept.append(part)
    return tuple(kept) if kept else ((parts[0][0], parts[0][0]),)


def wrapped(lo: Tensor, hi: Tensor) -> bool:
    """Whether bounds have overflowed int64; since they ascend, the first and the last are the extremes."""
    return len(lo) > 0 and bool(lo[-1] > FAR or hi[0] < -FAR)


def _joined(a: Ends, b: Ends) -> Ends | None:
    """Two disjoint parts as one, if in every row they are adjacent or one is empty, and the bounds do not decrease."""
    a_empty, b_empty = (lo == hi for lo, hi in (a, b))
    if not bool((a_empty | b_empty | (a[1] == b[0]) | (b[1] == a[0])).all()):
        return None
    lo = torch.where(a_empty, b[0], torch.where(b_empty, a[0], torch.minimum(a[0], b[0])))
    hi = torch.where(a_empty, b[1], torch.where(b_empty, a[1], torch.maximum(a[1], b[1])))
    return None if bool((lo.diff() < 0).any() or (hi.diff() < 0).any()) else (lo, hi)
