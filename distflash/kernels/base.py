"""What a kernel is: attention of one rank's queries over one source's keys, given by row and column intervals.

A kernel knows no layout, no rank and no mask. It never communicates. A new kernel is one new file (or folder) with a
subclass of `Kernel`.

[Note: shapes] B batch, T local queries, K local keys of the source, H query heads, G key/value heads (H is a multiple
of G; query head h reads key head ``h // (H // G)``), D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from distflash.intervals import Intervals
from distflash.kernels.machine import Machine
from distflash.partial import Partial
from distflash.plan import Pass

if TYPE_CHECKING:
    from distflash.kernels.decoding import Decoding


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
            first pass of a forward takes it in; no other pass and no backward reads it.
    """

    scale: float
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def facts(self) -> tuple[float, float]:
        """What a launch depends on of them, but for the tensors."""
        return self.scale, self.softcap

    def of_heads(self, heads: slice) -> Scores:
        """Those of some query heads."""
        slopes, sinks = (None if x is None else x[heads] for x in (self.alibi_slopes, self.sinks))
        return replace(self, alibi_slopes=slopes, sinks=sinks)


@dataclass(frozen=True)
class Keys:
    """One source's keys and values: k ``[B, K, G, D]``, v ``[B, K, G, V]``, and which of them each query sees."""

    k: Tensor
    v: Tensor
    rows: Intervals


@dataclass(frozen=True)
class Saved:
    """What the backward of a call knows of its queries, the same for every pass.

    Attributes:
        q: ``[B, T, H, D]``.
        dout: ``[B, T, H, V]``, the gradient of the output, in q's dtype.
        lse: ``[B, H, T]``, of the whole softmax (over all sources, sinks included); ``-inf`` where no key was seen.
        statistics: ``[2, B * H, T']``, T' at least T: lse and delta once more, as the kernel's own loops want them;
            None if as they are.
        own_delta: `delta`, where there are no statistics.
        counter: as in `Partial`, for a kernel whose programs add up dQ in memory; else None.
        sums: of dQ in the accumulator's dtype, between passes, for such a kernel, in an order that only it knows.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    own_delta: Tensor | None = None
    statistics: Tensor | None = None
    counter: Tensor | None = None
    sums: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """``[B, H, T]``, ``rowsum(dout * out)``, less the gradient of lse where there is one; undefined for rows that
        see no key.
        """
        if self.own_delta is not None:
            return self.own_delta
        assert self.statistics is not None
        B, T = self.q.shape[:2]
        return self.statistics[1, :, :T].unflatten(0, (B, -1))


@dataclass(frozen=True)
class QueryGradient:
    """dQ between passes: the same rules as `Partial`, with addition in place of the merge.

    Attributes:
        final: ``[B, T, H, D]`` in q's dtype, written by the last pass only.
        sum: the same in the accumulator's dtype, between passes; None where the only pass is the last, or the kernel
            keeps sums of its own (see `Saved`).
    """

    final: Tensor
    sum: Tensor | None


@dataclass(frozen=True)
class KeyGradient:
    """Where a pass writes its part of dK ``[B, K, G, D]`` and dV ``[B, K, G, V]``: whole, overwriting, never adding.

    Rounded to the tensors' own dtype, which is the accumulator's wherever parts of several passes are still to be
    added.
    """

    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class Abilities:
    """What a kernel can do beside all heads over the keys of one source, which plans make use of (`overlap`).

    Attributes:
        two_sources: a forward pass over the keys of two sources with nothing kept in between, and `Pass.begun`.
        some_heads: passes over some of the key heads, forward and backward (where `Saved.sums` are kept).
        enough_keys: how many keys, counted once for each key head, a backward pass of some heads should have not to
            leave the device idle.
        separate_gradients: dK and dV come from one launch, dQ from another.
    """

    two_sources: bool = False
    some_heads: bool = False
    enough_keys: int = 0
    separate_gradients: bool = False


class Kernel(ABC):
    """Exact attention of one rank's queries over one source's keys, forward and backward.

    Attributes:
        base: of the exponentials in the state between passes, to which the maximum is an exponent: e, or 2.
    """

    base: ClassVar[float] = math.e

    @abstractmethod
    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Every reason why this kernel cannot take the problem, each a readable sentence part; empty if it can."""

    def abilities(self, device: torch.device) -> Abilities:
        """By default none."""
        return Abilities()

    def rehearsing(self, machine: Machine) -> Kernel | None:
        """The same kernel for tensors without data (of device "meta"), launched as on such a GPU; for `warming`.

        None where nothing is compiled when a kernel is first launched, which is the default.
        """
        return None

    def decoding(self, device: torch.device) -> Decoding:
        """How a few new tokens attend to a cache; by default in plain torch. One object's steps follow one another."""
        from distflash.kernels.reference_decoding import ReferenceDecoding

        return ReferenceDecoding()

    @abstractmethod
    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        """Attend and merge into ``into`` (see `Partial`).

        Args:
            q: ``[B, T, H, D]``, the last dimension contiguous. T > 0.
            keys: of each source of the pass, with the last dimension contiguous. K > 0. Queries that see none are
                written as the identity by the first pass.
            each: its ``first``: start from ``scores.sinks``, or from nothing, else from ``into.running``.
                ``last``: write ``into.final`` and ``into.lse``, else ``into.running``. Where it has ``live``, rows
                do so by their own flags, and all others are left alone.
        """

    @abstractmethod
    def save(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Saved:
        """What all passes of a backward share: ``delta = rowsum(dout * out) - dlse``, and copies where needed.

        Args:
            q: ``[B, T, H, D]``, out, dout: ``[B, T, H, V]``, with any strides; lse, dlse: ``[B, H, T]``.
        """

    @abstractmethod
    def backward(
        self, saved: Saved, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        """Write this pass's dK and dV whole, and add to dQ.

        Args:
            saved: of the queries.
            keys: of the pass's source.
            each: its ``first`` and ``last`` are about dQ, over all heads: start from nothing, and write ``dq.final``.
                Its ``gradients`` leave either dQ or dK and dV out, for kernels of `Abilities.separate_gradients`.
        """
