"""What a kernel is: attention of one rank's queries over one owner's keys, given by row and column intervals.

A kernel knows no layout, no rank and no mask. It never communicates. A new kernel is one new file (or folder) whose
object has the methods of `Kernel`.

[Note: shapes] B batch, T local queries, K local keys of the owner, H query heads, G key/value heads (H is a multiple
of G; query head h reads key head ``h // (H // G)``), D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distflash.intervals import Intervals
from distflash.partial import Partial


@dataclass(frozen=True)
class Problem:
    """What a call asks of a kernel, known before any data is touched."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0


@dataclass(frozen=True)
class Scores:
    """How scores are formed: ``s = q.k * scale``, then ``softcap * tanh(s / softcap)``, then ``- slope * |i - j|``.

    Attributes:
        scale: multiplies ``q.k``.
        softcap: 0 for none.
        alibi_slopes: float32 ``[H]``, contiguous, or None; ``i`` and ``j`` are global positions.
        sinks: ``[H]``, contiguous, or None; one more logit per head in the softmax's denominator, with no value. The
            first hop of a forward pass takes it in; no other hop and no backward reads it.
    """

    scale: float
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Hop:
    """Where in a rank's sequence of hops this one stands: the first writes, later ones merge, the last rounds."""

    first: bool
    last: bool


@dataclass(frozen=True)
class Keys:
    """One owner's keys and values: k ``[B, K, G, D]``, v ``[B, K, G, V]``, and which of them each query sees."""

    k: Tensor
    v: Tensor
    rows: Intervals


@dataclass(frozen=True)
class Saved:
    """What the backward pass of a call knows of its queries, the same for every hop.

    Attributes:
        q: ``[B, T, H, D]``.
        dout: ``[B, T, H, V]``, the gradient of the output, in q's dtype.
        lse: ``[B, H, T]``, of the whole softmax (over all owners, sinks included); ``-inf`` where no key was seen.
        delta: ``[B, H, T]``, ``rowsum(dout * out)``, less the gradient of lse where there is one; of no meaning where
            no key was seen.
        statistics: lse and delta once more, as the kernel's own loops want them; None if as they are.
        counter: as in `Partial`, for a kernel whose programs add up dQ in memory; else None.
        sums: of dQ in the accumulator's dtype, between hops, for such a kernel, in an order that only it knows.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    statistics: Tensor | None = None
    counter: Tensor | None = None
    sums: Tensor | None = None


@dataclass(frozen=True)
class QueryGradient:
    """dQ between hops: the same rules as `Partial`, with addition in place of the merge.

    Attributes:
        final: ``[B, T, H, D]`` in q's dtype, written by the last hop only.
        sum: the same in the accumulator's dtype, between hops; None where the only hop is the last, or the kernel keeps
            sums of its own (see `Saved`).
    """

    final: Tensor
    sum: Tensor | None


@dataclass(frozen=True)
class KeyGradient:
    """Where a hop writes its part of dK ``[B, K, G, D]`` and dV ``[B, K, G, V]``: whole, overwriting, never adding.

    Rounded to the tensors' own dtype, which is the accumulator's wherever parts of several hops are still to be added.
    """

    dk: Tensor
    dv: Tensor


class Kernel(Protocol):
    """One owner's share of exact attention, forward and backward."""

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Every reason why this kernel cannot take the problem, each a readable sentence part; empty if it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Intervals, scores: Scores, hop: Hop, into: Partial
    ) -> None:
        """Attend and merge into ``into`` (see `Partial`).

        Args:
            q: ``[B, T, H, D]``, k: ``[B, K, G, D]``, v: ``[B, K, G, V]``, the last dimension contiguous. T, K > 0.
            rows: which keys each query sees. Rows that see none are written as the identity by the first hop.
            hop: ``first``: start from ``scores.sinks``, or from nothing, else from ``into.running``.
                ``last``: write ``into.final`` and ``into.lse``, else ``into.running``.
        """
        ...

    def save(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Saved:
        """What all hops of a backward pass share: ``delta = rowsum(dout * out) - dlse``, and copies where needed.

        Args:
            q: ``[B, T, H, D]``, out, dout: ``[B, T, H, V]``, with any strides; lse, dlse: ``[B, H, T]``.
        """
        ...

    def backward(
        self,
        saved: Saved,
        k: Tensor,
        v: Tensor,
        rows: Intervals,
        scores: Scores,
        hop: Hop,
        dq: QueryGradient,
        dkv: KeyGradient,
        keys_done: Callable[[], None],
    ) -> None:
        """Write this hop's dK and dV whole, and add to dQ (``hop`` as in `forward`).

        ``keys_done`` is called once, as soon as everything that writes dK and dV has been launched, so that they can
        travel home under the rest of the work.
        """
        ...


@runtime_checkable
class Pairing(Kernel, Protocol):
    """A kernel that can take the keys of two owners in one pass, with no state in between, and heads by themselves.

    A rank's own keys are there from the start. It is enough that some heads attend to them while the first keys are on
    their way; all others wait, and take both. In a backward pass the others come last, while gradients travel home.
    """

    def forward_some(self, q: Tensor, own: Keys, scores: Scores, kv_heads: int, into: Partial) -> None:
        """`Kernel.forward` of a first hop that is not the last, for the first ``kv_heads`` key heads only."""
        ...

    def forward_both(
        self, q: Tensor, own: Keys, other: Keys, scores: Scores, kv_heads: int, last: bool, into: Partial
    ) -> None:
        """After `forward_some`: the other owner's keys for those heads, the keys of both for all others."""
        ...

    def backward_some(
        self, saved: Saved, own: Keys, scores: Scores, heads: range, hop: Hop, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        """`Kernel.backward` for these key heads only, before or after other owners, where ``saved.sums`` are kept."""
        ...

    def enough_keys(self, device: torch.device) -> int:
        """How many keys, counted once for each key head, `backward_some` should be given not to leave a GPU idle."""
        ...
