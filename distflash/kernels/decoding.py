"""The interface of decoding kernels: a few new tokens of each sequence over the cached keys of this rank.

All ranks have the same new tokens. Each new key is stored by one rank. Each rank attends to the keys that it stores,
and the partial states of all ranks are merged. Lengths and counts are in device memory, so a step needs no host, and
can be captured in a CUDA graph and replayed while the cache grows.

[Note: shapes] B sequences, n new tokens of each, W ranks, C keys that a rank has memory for, H query heads, G key/value
heads (query head h reads key head ``h // (H // G)``), D head dim of q and k, V of v, P parts of the mask.

[Note: message] A rank's message about a sequence is one row of numbers in the accumulator's dtype: its partial state
``weighted [n, H, V]``, ``maximum [n, H]``, ``total [n, H]`` (`partial.Softmax`, base e), and four words whose bits are
integers: the length, digests of the counts and of the queries, and 0.

[Note: fault] 0, or the reason why steps compute nothing and leave the cache unchanged until the host resets it:
`DIFFER`, the ranks' lengths, counts or queries differ; `FULL`, no memory for the new keys; `BEYOND`, positions after
the end of the table. Results are NaN then.
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
    """One rank's part of a cache, in device memory that is allocated once.

    Attributes:
        k, v: ``[B, C, G, D]`` and ``[B, C, G, V]``; the keys of a sequence are at the front, in ascending position.
        positions: int32 ``[B, C]``, the global positions of these keys.
        counts: int32 ``[B, W]``, how many keys each rank stores.
        lengths: int32 ``[B]``, the length of each sequence in tokens, which is the position of its next token.
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
        """C, the number of keys of a sequence that each rank has memory for."""
        return self.k.shape[1]

    @property
    def world_size(self) -> int:
        return self.counts.shape[1]


@dataclass(frozen=True)
class Table:
    """The bounds of a mask's intervals at the positions to come. A query sees the keys of all parts.

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
        """Store this rank's share of the new keys, and attend to all of its keys.

        Each new key, in order, is stored by the rank with the fewest keys at that time, the lowest of several
        (`cache_balance.storing_ranks`), after its other keys. `merge` updates lengths and counts.

        Args:
            q: ``[B, n, H, D]``, k: ``[B, n, G, D]``, v: ``[B, n, G, V]``, the same on all ranks.
            table: of the mask.
            scores: without sinks, which `merge` adds.
            rank: this one.

        Returns:
            ``[B, n * H * (V + 2) + 4]``, see [Note: message].
        """

    @abstractmethod
    def merge(self, messages: Tensor, q: Tensor, store: Store, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Merge all ranks' messages in order, then the sinks; update lengths and counts.

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
