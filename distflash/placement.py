"""What users hold, and what kernels see: a way in for queries and keys, and a way out for results and gradients.

[Note: shapes] Queries and keys are ``[B, T, heads, dim]``, numbers of a query and head ``[B, heads, T]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Tensors = tuple[Tensor, ...]


class Held(NamedTuple):
    """Tensors of one rank.

    Attributes:
        queries: such as q, out and their gradients.
        keys: such as k, v and their gradients.
        numbers: such as lse and its gradient.
    """

    queries: Tensors = ()
    keys: Tensors = ()
    numbers: Tensors = ()


class Sizes(NamedTuple):
    """Sizes of a rank's tensors.

    Attributes:
        batch: of all.
        heads: which query heads of the call.
        kv_heads: how many key heads.
    """

    batch: int
    heads: slice
    kv_heads: int


class Placement(ABC):
    """One change from what a rank's user holds to what its kernels see, and back."""

    @abstractmethod
    def inward(self, held: Held) -> Held:
        """What kernels see."""

    @abstractmethod
    def outward(self, seen: Held) -> Held:
        """The inverse, for results and gradients. Keys' gradients that are parts of one sum are added up."""

    def sizes(self, sizes: Sizes) -> Sizes:
        """What becomes of the sizes; by default they stay."""
        return sizes

    @property
    def adds_keys(self) -> bool:
        """Whether `outward` adds gradients of keys, which are then to be in the accumulator's dtype."""
        return False


def inward(placements: Sequence[Placement], held: Held) -> Held:
    """All of them, one after the other."""
    for placement in placements:
        held = placement.inward(held)
    return held


def outward(placements: Sequence[Placement], seen: Held) -> Held:
    """The inverse of `inward`."""
    for placement in reversed(placements):
        seen = placement.outward(seen)
    return seen


def sizes(placements: Sequence[Placement], held: Sizes) -> Sizes:
    """What kernels see, of what users hold."""
    for placement in placements:
        held = placement.sizes(held)
    return held
