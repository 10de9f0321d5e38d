"""Shifted tokens and labels for multi-token prediction: shifted in the whole sequence, then sharded.

[Note: shapes] B batch, T local tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distflash.context import ContextParallel
from distflash.integrations.labels import shift
from distflash.masks import Documents


@dataclass(frozen=True)
class Shifted:
    """Shifted values of this rank's tokens: int64 ``[B, T]`` for each number of tokens to shift by.

    tokens: 0 after the end of a document. labels: -100 there; empty if the batch has none.
    """

    tokens: Mapping[int, Tensor]
    labels: Mapping[int, Tensor]


def shard_shifted(
    batch: Mapping[str, Any], cp: ContextParallel, documents: Documents | None, shifts: Sequence[int]
) -> Shifted:
    """Shift within documents, then shard: ``input_ids``, and ``labels`` or ``shift_labels`` if there are any."""
    labels, done = batch.get("labels"), 0
    if batch.get("shift_labels") is not None:
        labels, done = batch["shift_labels"], 1
    return Shifted(
        {by: cp.shard(shift(batch["input_ids"], by, documents, fill=0)) for by in shifts},
        {} if labels is None else {by: cp.shard(shift(labels, by - done, documents)) for by in shifts},
    )


def as_shifts(shifts: Any) -> tuple[int, ...]:
    """The ``shifts`` argument of `shard_batch`, checked.

    Raises:
        ValueError: they are no positive integers.
    """
    numbers = tuple(shifts) if isinstance(shifts, Sequence) else (None,)
    if not all(type(by) is int and by >= 1 for by in numbers):
        raise ValueError(f"shifts: expected numbers of tokens, each at least 1, as in (1, 2), got {shifts!r}")
    return numbers
