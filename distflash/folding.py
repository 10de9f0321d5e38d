"""The placement of `Rows`: the sequences of a batch concatenated to one sequence.

[Note: shapes] B batch, T local tokens, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distflash.placement import Held, Placement, Sizes


@dataclass(frozen=True)
class Folding(Placement):
    """Tensors ``[B, T, H, D]`` and ``[B, H, T]`` as those of one sequence, ``[1, B * T, H, D]`` and ``[1, H, B * T]``.

    Attributes:
        rows: B, at least 1.
    """

    rows: int

    def sizes(self, sizes: Sizes) -> Sizes:
        return sizes._replace(batch=1)

    def inward(self, held: Held) -> Held:
        """The sequences one after the other; views where strides allow it."""
        numbers = tuple(x.transpose(0, 1).flatten(1)[None] for x in held.numbers)
        return Held(_end_to_end(held.queries), tuple(x.contiguous() for x in _end_to_end(held.keys)), numbers)

    def outward(self, seen: Held) -> Held:
        """The inverse, contiguous if the tensors are."""
        numbers = (x[0].unflatten(1, (self.rows, x.shape[2] // self.rows)) for x in seen.numbers)
        return Held(
            tuple(map(self._apart, seen.queries)),
            tuple(map(self._apart, seen.keys)),
            tuple(x.transpose(0, 1).contiguous() for x in numbers),
        )

    def _apart(self, x: Tensor) -> Tensor:
        return x[0].unflatten(0, (self.rows, x.shape[1] // self.rows))


def _end_to_end(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.flatten(0, 1)[None] for x in tensors)
