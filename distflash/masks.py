"""Masks as pairs of monotone ends.

Every mask gives the query at global position ``i`` one interval of keys ``lo(i) <= j < hi(i)``, and neither end
ever moves backwards as ``i`` grows. Everything else in the package (skipping hops, splitting tiles into full and
partial, transposing for the keys' backward) follows from these two facts; see ``docs/math.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Mask(ABC):
    """Which keys a query may see. Compose two masks with ``&``: a pair is allowed where both allow it.

    A new mask is one frozen dataclass with one method, `ends`.
    """

    @abstractmethod
    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        """Both ends of the keys' interval, ``lo <= j < hi``, of each query.

        Args:
            positions: int64 ``[n]``, ascending global positions of queries.
            seq_len: the global sequence length ``S``.

        Returns:
            ``(lo, hi)``, int64 ``[n]`` each, both non-decreasing. They may reach outside ``[0, S)`` and an
            interval may be empty (``hi <= lo``): `intervals` clamps them.
        """

    @property
    def seq_len(self) -> int | None:
        """The global sequence length, where the mask knows it (`Documents`), else None."""
        return None

    def materialize(self, q_positions: Tensor, k_positions: Tensor, seq_len: int | None = None) -> Tensor:
        """The mask as a dense boolean ``[n_q, n_k]``, True where the query sees the key: the oracle of tests.

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
        lo, hi = self.ends(q_positions, seq_len)
        keys = k_positions[None, :]
        return (keys >= lo[:, None]) & (keys < hi[:, None])

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return And(self, other)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key: ``[0, S)``."""

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(positions), torch.full_like(positions, seq_len)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and what came before: ``[0, i + 1)``."""

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(positions), positions + 1


@dataclass(frozen=True)
class Window(Mask):
    """A query sees ``left`` keys before itself, itself, and ``right`` keys after: ``[i - left, i + right + 1)``.

    A causal sliding window of ``w`` keys, the query's own among them, is ``Window(w - 1, 0)``.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        _require_count("Window", "left", self.left, 0)
        _require_count("Window", "right", self.right, 0)

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        return positions - self.left, positions + self.right + 1


@dataclass(frozen=True)
class Documents(Mask):
    """Packed documents: a query sees the keys of its own document and no other.

    Args:
        cu_seqlens: cumulative lengths ``[0, l0, l0 + l1, ..., S]``, as a sequence of ints or an integer tensor
            ``[documents + 1]`` (a tensor on a GPU is copied to the host once, here: build the mask once a step). In a
            function that `torch.compile` compiles, a tensor is read and checked by the call, when the graph runs.

    Attributes:
        boundaries: ``cu_seqlens`` as an int64 tensor on the CPU, which a compiled graph takes as an input, so that one
            graph serves all documents; None for ints given in a compiled function.

    Raises:
        ValueError: it does not start at 0, or does not rise at every step. That it ends at S is checked by the
            call, which knows S.
    """

    cu_seqlens: tuple[int, ...]
    boundaries: Tensor | None = field(default=None, init=False, compare=False, repr=False)

    def __init__(self, cu_seqlens: Sequence[int] | Tensor) -> None:
        if torch.compiler.is_compiling() and isinstance(cu_seqlens, Tensor):
            _require_integers(cu_seqlens)
            object.__setattr__(self, "boundaries", cu_seqlens)
            return
        object.__setattr__(self, "cu_seqlens", _as_ints(cu_seqlens))
        ends = self.cu_seqlens
        if len(ends) < 2 or ends[0] != 0:
            raise ValueError(
                f"Documents(cu_seqlens): expected at least [0, S], starting at 0, got {_short(ends)}; "
                "pass cumulative lengths such as [0, 3, 8] for documents of 3 and 5 tokens"
            )
        for n, (start, stop) in enumerate(pairwise(ends)):
            if stop <= start:
                raise ValueError(
                    f"Documents(cu_seqlens): must rise, but cu_seqlens[{n + 1}] = {stop} follows "
                    f"cu_seqlens[{n}] = {start}; leave out empty documents and pass cumulative lengths, not lengths"
                )
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "boundaries", torch.tensor(ends, dtype=torch.int64, device="cpu"))

    def __reduce__(self) -> Any:
        return Documents, (self.cu_seqlens,)

    @property
    def seq_len(self) -> int:
        return self.cu_seqlens[-1]

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        boundaries = torch.tensor(self.cu_seqlens, dtype=torch.int64, device=positions.device)
        document = torch.searchsorted(boundaries, positions.contiguous(), right=True) - 1
        document = document.clamp(0, len(self.cu_seqlens) - 2)
        return boundaries[document], boundaries[document + 1]


@dataclass(frozen=True)
class PrefixLM(Mask):
    """The first ``length`` keys are seen by every query, the rest causally: ``[0, max(length, i + 1))``."""

    length: int

    def __post_init__(self) -> None:
        _require_count("PrefixLM", "length", self.length, 0)

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(positions), (positions + 1).clamp_min(self.length)


@dataclass(frozen=True)
class Chunked(Mask):
    """A query sees its own chunk of ``size`` positions: ``[i // size * size, i // size * size + size)``."""

    size: int

    def __post_init__(self) -> None:
        _require_count("Chunked", "size", self.size, 1)

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        start = torch.div(positions, self.size, rounding_mode="floor") * self.size
        return start, start + self.size


@dataclass(frozen=True)
class And(Mask):
    """Both masks at once: the larger ``lo`` and the smaller ``hi``. Written ``a & b``.

    Raises:
        ValueError: the two sides are for different lengths.
    """

    first: Mask
    second: Mask

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # lengths are data there; the call, which has them, makes the mask again
            return
        a, b = self.first.seq_len, self.second.seq_len
        if a is not None and b is not None and a != b:
            raise ValueError(
                f"mask: the two sides of & are for different lengths, {a} and {b}; "
                "both cu_seqlens must end at the same S"
            )

    @property
    def seq_len(self) -> int | None:
        return self.second.seq_len if self.first.seq_len is None else self.first.seq_len

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        lo_a, hi_a = self.first.ends(positions, seq_len)
        lo_b, hi_b = self.second.ends(positions, seq_len)
        return torch.maximum(lo_a, lo_b), torch.minimum(hi_a, hi_b)


def _require_count(owner: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{owner}({name}): expected an int of at least {least}, got {value!r}")


def _as_ints(values: Sequence[int] | Tensor) -> tuple[int, ...]:
    if isinstance(values, Tensor):
        _require_integers(values)
        return tuple(values.tolist())
    if isinstance(values, str):
        raise ValueError(f"Documents(cu_seqlens): expected ints, got the string {values!r}")
    ints = tuple(int(v) for v in values)
    if any(a != b for a, b in zip(ints, values, strict=True)):
        raise ValueError(f"Documents(cu_seqlens): expected whole numbers, got {_short(values)}")
    return ints


def _require_integers(values: Tensor) -> None:
    if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"Documents(cu_seqlens): expected a one-dimensional integer tensor, got {values.dtype} with shape "
            f"{tuple(values.shape)}"
        )


def _short(values: Sequence[object]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ... {values[-1]}]"
