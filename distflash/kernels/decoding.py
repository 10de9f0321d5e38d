"""What a decoding kernel is: a few new tokens of each sequence over the keys that this rank keeps of it.

All ranks have the same new tokens. Each new key is kept by one of them; each rank attends to what it keeps, and the
softmaxes of all ranks are merged. A step waits for no host: lengths and who keeps what stand in device memory, so that
a step can be captured in a CUDA graph and replayed while the cache grows.

[Note: shapes] B sequences, n new tokens of each, W ranks, C keys that a rank has room for, H query heads, G key/value
heads (query head h reads key head ``h // (H // G)``), D head dim of q and k, V of v, P parts of the mask.

[Note: message] What a rank tells the others of a sequence is one row of numbers in the accumulator's dtype:
``weighted [n, H, V]``, ``maximum [n, H]``, ``total [n, H]`` of its softmax (`partial.Softmax`, base e), and four words
whose bits are integers: the length, digests of the counts and of the queries, and 0.

[Note: fault] 0; or why nothing was computed and the cache has stayed as it was, until the host resets it: `DIFFER`,
the ranks' lengths, counts or queries differ; `FULL`, no room for the new keys; `BEYOND`, positions beyond the table.
Where it is set the results are NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from distflash.kernels.base import Scores

DIFFER, FULL, BEYOND = 1, 2, 3
WORDS = 4


@dataclass(frozen=True)
class Store:
    """What one rank keeps of a cache, in device memory that is allocated once.

    Attributes:
        k, v: ``[B, C, G, D]`` and ``[B, C, G, V]``, a sequence's keys in ascending position from the start.
        positions: int32 ``[B, C]``, the global positions of these keys.
        counts: int32 ``[B, W]``, how many keys each rank keeps.
        lengths: int32 ``[B]``, how many tokens each sequence has had, which is the position of its next one.
        fault: int32 ``[1]``, see [Note: fault].
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    counts: Tensor
    lengths: Tensor
    fault: Tensor

    @property
    def room(self) -> int:
        """How many keys of a sequence there is room for on this rank, the same on all ranks."""
        return self.k.shape[1]

    @property
    def world_size(self) -> int:
        return self.counts.shape[1]


@dataclass(frozen=True)
class Table:
    """The ends of a mask's intervals at the positions to come: the query at p sees the keys of all of its parts.

    Attributes:
        start: the first position.
        ends: int32 ``[R, 2, P, N]``: ``lo`` and ``hi``, global, of N positions. R is 1, or B for a mask of each
            sequence.
    """

    start: int
    ends: Tensor


class Decoding(ABC):
    """A step of decoding: `attend` on each rank, a gather of the messages, `merge` on each rank."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, rank: int) -> Tensor:
        """Keep the new keys that are this rank's, and attend to all that it keeps.

        The keeper of each new key, in order, is the rank that has fewest then, the first of several
        (`dealing.keepers`). Its key is written behind those that there are. Lengths and counts stay as they
        are until `merge`.

        Args:
            q: ``[B, n, H, D]``, k: ``[B, n, G, D]``, v: ``[B, n, G, V]``, the same on all ranks.
            table: of the mask.
            scores: without sinks, which `merge` takes in.
            rank: this one.

        Returns:
            ``[B, n * H * (V + 2) + 4]``, see [Note: message].
        """

    @abstractmethod
    def merge(self, messages: Tensor, q: Tensor, store: Store, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result of all ranks' messages, merged in their order and then with the sinks; lengths and counts grow.

        Args:
            messages: ``[W, B, n * H * (V + 2) + 4]``.
            q: ``[B, n, H, D]``.
            sinks: ``[H]`` or None.

        Returns:
            out ``[B, n, H, V]`` in q's dtype, lse ``[B, n, H]`` in the accumulator's.
        """

    def alone(
        self, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`attend` and `merge` of a single rank."""
        return self.merge(self.attend(q, k, v, store, table, scores, 0)[None], q, store, sinks)
