"""The basic masks. Those of particular models are in `patterns`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from distflash.integers import FAR, as_boundaries, as_data, as_tensors, set_count
from distflash.mask_algebra import And, Ends, Mask, Or

# Mask, And and Or are among them, since users know them from here.
__all__ = ["And", "Causal", "Chunked", "Documents", "Ends", "Full", "Mask", "Or", "PrefixLM", "Window"]


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key: ``[0, S)``.

    Examples:
        >>> i = torch.arange(5)
        >>> df.Full().materialize(i, i).int()
        tensor([[1, 1, 1, 1, 1],
                [1, 1, 1, 1, 1],
                [1, 1, 1, 1, 1],
                [1, 1, 1, 1, 1],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        return torch.zeros_like(positions), torch.full_like(positions, seq_len)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees its own key and all earlier ones: ``[0, i + 1)``.

    Examples:
        >>> i = torch.arange(5)
        >>> df.Causal().materialize(i, i).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        return torch.zeros_like(positions), positions + 1


@dataclass(frozen=True)
class Window(Mask):
    """A query sees ``left`` keys before itself, itself, and ``right`` keys after: ``[i - left, i + right + 1)``.

    A causal sliding window of ``w`` keys, including the query's own, is ``Window(w - 1, 0)``. ``sys.maxsize`` is no
    limit: ``Window(sys.maxsize, 0)`` is `Causal`.

    Raises:
        ValueError: a side is not an int of at least 0 (-1 stands for "no limit" elsewhere, and is refused here).

    Examples:
        >>> i = torch.arange(5)
        >>> df.Window(1).materialize(i, i).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [0, 1, 1, 0, 0],
                [0, 0, 1, 1, 0],
                [0, 0, 0, 1, 1]], dtype=torch.int32)
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        set_count(self, "left", least=0, hint="; for no limit write sys.maxsize")
        set_count(self, "right", least=0, hint="; for no limit write sys.maxsize")

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        # FAR is beyond every position.
        return positions - min(self.left, FAR), positions + min(self.right, FAR) + 1


@dataclass(frozen=True)
class Documents(Mask):
    """Packed documents: a query sees only the keys of its own document.

    Args:
        cu_seqlens: cumulative lengths ``[0, l0, l0 + l1, ..., S]``, as integers in a sequence, an array or a tensor
            ``[documents + 1]`` (a tensor on a GPU is copied to the host once, here: build the mask once a step).
            Repeated values are empty documents or padding at the end, and are left out of the mask. Under
            `torch.compile` the call reads and checks all values when the graph runs.

    Raises:
        ValueError: it does not start at 0, decreases, or does not consist of integers. The call checks that it ends at
            S.

    Examples:
        >>> i = torch.arange(5)
        >>> (df.Causal() & df.Documents([0, 2, 5])).materialize(i, i).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [0, 0, 1, 0, 0],
                [0, 0, 1, 1, 0],
                [0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    cu_seqlens: tuple[int, ...]

    def __init__(self, cu_seqlens: Sequence[SupportsIndex] | Tensor) -> None:
        if torch.compiler.is_compiling():
            object.__setattr__(self, "cu_seqlens", as_data(cu_seqlens, "Documents(cu_seqlens)"))
            return
        # Masks that differ only in padding are equal: plans and compiled graphs are cached by the mask.
        ends = as_boundaries(cu_seqlens, "Documents(cu_seqlens)", "documents")
        object.__setattr__(self, "cu_seqlens", ends)
        object.__setattr__(self, "graph_inputs", as_tensors(ends))

    def __reduce__(self) -> Any:
        return Documents, (self.cu_seqlens,)

    def jumps(self, seq_len: int) -> Tensor:
        return as_tensors(self.cu_seqlens)[0] if self.graph_inputs is None else self.graph_inputs[0]

    @property
    def seq_len(self) -> int:
        return self.cu_seqlens[-1]

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        boundaries = torch.tensor(self.cu_seqlens, dtype=torch.int64, device=positions.device)
        document = torch.searchsorted(boundaries, positions.contiguous(), right=True) - 1
        document = document.clamp(0, len(self.cu_seqlens) - 2)
        return boundaries[document], boundaries[document + 1]


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Every query sees the first ``length`` keys, and the others causally: ``[0, max(length, i + 1))``.

    Examples:
        >>> i = torch.arange(5)
        >>> df.PrefixLM(3).materialize(i, i).int()
        tensor([[1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    length: int

    def __post_init__(self) -> None:
        set_count(self, "length", least=0)

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        return torch.zeros_like(positions), (positions + 1).clamp_min(min(self.length, FAR))

    def jumps(self, seq_len: int) -> Tensor:
        return torch.tensor([min(self.length, seq_len)])


@dataclass(frozen=True)
class Chunked(Mask):
    """A query sees its own chunk of ``size`` positions: ``[i // size * size, i // size * size + size)``.

    Examples:
        >>> i = torch.arange(5)
        >>> (df.Causal() & df.Chunked(2)).materialize(i, i).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [0, 0, 1, 0, 0],
                [0, 0, 1, 1, 0],
                [0, 0, 0, 0, 1]], dtype=torch.int32)
    """

    size: int

    def __post_init__(self) -> None:
        set_count(self, "size", least=1)

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        size = min(self.size, FAR)
        start = torch.div(positions, size, rounding_mode="floor") * size
        return start, start + size

    def jumps(self, seq_len: int) -> Tensor:
        return torch.arange(0, seq_len, min(self.size, FAR))
