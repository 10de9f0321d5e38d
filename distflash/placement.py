"""Placements: redistribution of queries and keys before attention, and its inverse for results and gradients.

[Note: shapes] Queries and keys are ``[B, T, heads, dim]``; one number per query and head is ``[B, heads, T]``.
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
        queries: q, out and their gradients.
        keys: k, v and their gradients.
        numbers: lse and its gradient.
    """

    queries: Tensors = ()
    keys: Tensors = ()
    numbers: Tensors = ()


class Sizes(NamedTuple):
    """Sizes of a rank's tensors.

    Attributes:
        batch: the batch size.
        heads: which of the call's query heads the tensors have.
        kv_heads: the number of key heads.
    """

    batch: int
    heads: slice
    kv_heads: int


class Placement(ABC):
    """One redistribution of a rank's tensors, and its inverse."""

    @abstractmethod
    def inward(self, held: Held) -> Held:
        """The redistributed tensors."""

    @abstractmethod
    def outward(self, seen: Held) -> Held:
        """The inverse, for results and gradients. Gradients of replicated keys are added."""

    def sizes(self, sizes: Sizes) -> Sizes:
        """The sizes after `inward`; by default the same."""
        return sizes

    @property
    def adds_keys(self) -> bool:
        """Whether `outward` adds gradients of keys, which then have to be in the accumulator's dtype."""
        return False


def inward(placements: Sequence[Placement], held: Held) -> Held:
    """Apply all placements in order."""
    for placement in placements:
        held = placement.inward(held)
    return held


def outward(placements: Sequence[Placement], seen: Held) -> Held:
    """The inverse of `inward`."""
    for placement in reversed(placements):
        seen = placement.outward(seen)
    return seen


def sizes(placements: Sequence[Placement], held: Sizes) -> Sizes:
    """The sizes after `inward` of all placements."""
    for placement in placements:
        held = placement.sizes(held)
    return held
