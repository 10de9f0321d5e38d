"""The interface of kernels: attention of one rank's queries over one source's keys, masked by a range [lo, hi)
of keys per query, and of queries per key.

A kernel knows no layout, no rank and no mask. It never communicates. A new kernel is one new file (or folder) with a
subclass of `Kernel`.

[Note: shapes] B batch, T local queries, K local keys of the source, H query heads, G key/value heads (H is a multiple
of G; query head h reads key head ``h // (H // G)``), D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from distflash.dropout import Dropout
from distflash.intervals import Intervals
from distflash.kernels.machine import Machine
from distflash.partial import Partial
from distflash.plan import Pass

if TYPE_CHECKING:
    from distflash.kernels.decoding import Decoding


@dataclass(frozen=True)
class Problem:
    """What decides whether a kernel supports a call. It holds no tensors."""

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
    max_logits: bool = False


@dataclass(frozen=True)
class Scores:
    """How scores are formed: ``s = q.k * scale``, then ``softcap * tanh(s / softcap)``, then ``- slope * |i - j|``.

    Attributes:
        scale: multiplies ``q.k``.
        softcap: 0 for none.
        alibi_slopes: float32 ``[H]``, contiguous, or None; ``i`` and ``j`` are global positions.
        sinks: ``[H]``, contiguous, or None; one extra logit per head in the softmax's denominator, without a value
            vector. Added once in a forward: by its first pass, or at the end with `Partial.maxima`. No backward pass
            reads it.
        dropout: of the probabilities, not of the softmax's denominator; None for none. Weighted values of the running
            state include its factor ``1 / (1 - p)``.
    """

    scale: float
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout: Dropout | None = None

    @staticmethod
    def of(
        d_qk: int,
        scale: float | None,
        softcap: float,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        dropout: Dropout | None = None,
    ) -> Scores:
        """Those of a call, with tensors made contiguous for the kernels."""
        slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous().resolve_neg()
        sinks = None if sinks is None else sinks.contiguous().resolve_neg()
        return Scores(d_qk**-0.5 if scale is None else scale, softcap, slopes, sinks, dropout)

    @cached_property
    def facts(self) -> tuple[float, ...]:
        """The scalars, as part of the cache key of a kernel launch; see `Pass.facts`."""
        if self.dropout is None:
            return self.scale, self.softcap
        return self.scale, self.softcap, self.dropout.threshold, self.dropout.first_head

    def of_heads(self, heads: slice) -> Scores:
        """The same for a slice of the query heads."""
        slopes, sinks = (None if x is None else x[heads] for x in (self.alibi_slopes, self.sinks))
        dropout = None if self.dropout is None else self.dropout.of_heads(heads)
        return replace(self, alibi_slopes=slopes, sinks=sinks, dropout=dropout)


@dataclass(frozen=True)
class Keys:
    """One source's keys and values: k ``[B, K, G, D]``, v ``[B, K, G, V]``, and which of them each query sees."""

    k: Tensor
    v: Tensor
    rows: Intervals


@dataclass(frozen=True)
class BackwardContext:
    """What all passes of a backward share: the queries' tensors, as `Kernel.preprocess` prepares them.

    Attributes:
        q: ``[B, T, H, D]``.
        dout: ``[B, T, H, V]``, the gradient of the output, in q's dtype.
        lse: ``[B, H, T]``, of the final softmax (over all sources, sinks included); ``-inf`` for rows with no visible
            key.
        own_delta: `delta`, for kernels without ``lse_delta``.
        lse_delta: ``[2, B * H, T']``, T' at least T: lse (in base 2) and delta in the layout that the kernel's loops
            read; None if they read ``lse`` and ``own_delta``.
        counter: int32 ``[2]``, zeroed by the first pass, and zero after each: the atomic counter of a kernel's tile
            scheduler, if any.
        dq_accum: the dQ accumulator in global memory, to which all passes add, in a kernel-specific memory layout and
            the accumulator's dtype; None for kernels that accumulate in `QueryGradient.sum`.
        semaphores: int32 ``[B * H, tiles]``, of the tiles of ``dq_accum``, for a kernel that adds to these in an order;
            else None.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    own_delta: Tensor | None = None
    lse_delta: Tensor | None = None
    counter: Tensor | None = None
    dq_accum: Tensor | None = None
    semaphores: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """``[B, H, T]``: ``rowsum(dout * out) - dlse``; undefined for rows with no visible key."""
        if self.own_delta is not None:
            return self.own_delta
        assert self.lse_delta is not None
        B, T = self.q.shape[:2]
        return self.lse_delta[1, :, :T].unflatten(0, (B, -1))


@dataclass(frozen=True)
class QueryGradient:
    """Output buffers for dQ: as in `Partial`, a running state and a final result, but passes add instead of merging.

    Attributes:
        final: ``[B, T, H, D]`` in q's dtype, written by the last pass only.
        sum: ``[B, T, H, D]`` in the accumulator's dtype, kept between passes; None if there is only one pass, or if the
            kernel accumulates in `BackwardContext.dq_accum`.
    """

    final: Tensor
    sum: Tensor | None


@dataclass(frozen=True)
class KeyGradient:
    """Buffers for dK ``[B, K, G, D]`` and dV ``[B, K, G, V]`` of a pass, which overwrites all of them.

    The pass rounds to the buffers' dtype. That is float32 (the accumulator's) if other passes add to the buffer later.
    """

    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class Abilities:
    """Optional features of a kernel, which `overlap` uses. Every kernel runs passes of all heads over one source.

    Attributes:
        two_sources: one forward launch loops over the K/V of two ranks without storing softmax state in between, and
            supports `Pass.begun`.
        some_heads: passes over a subset of the key heads, forward and backward (with `BackwardContext.dq_accum`).
        smallest_work: the least ``batch * keys * KV heads`` of a backward pass over a subset of the heads; below it,
            such a pass would leave multiprocessors idle.
        separate_gradients: dK and dV come from one launch, dQ from another.
        ordered_blocks: backward passes add to dQ in an order, by blocks of so many keys to tiles of so many queries,
            and take it from `Pass.turns`; None for no order.
    """

    two_sources: bool = False
    some_heads: bool = False
    smallest_work: int = 0
    separate_gradients: bool = False
    ordered_blocks: tuple[int, int] | None = None


_IDENTITIES: dict[Kernel, object] = {}


class Kernel(ABC):
    """Exact attention of one rank's queries over one source's keys, forward and backward.

    Attributes:
        base: e or 2, the base of the exponentials in the running state. With 2, scores and their maximum are multiplied
            by log2(e).
    """

    base: ClassVar[float] = math.e

    @cached_property
    def identity(self) -> object:
        """The same object for equal kernels, which hashes faster than they do: part of the key of every launch.

        A copy of it, as of a pickled kernel, equals nothing else.
        """
        return _IDENTITIES.setdefault(self, object())

    @abstractmethod
    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Why this kernel does not support the problem, as clauses of an error message; empty if it does."""

    def abilities(self, device: torch.device) -> Abilities:
        """By default none."""
        return Abilities()

    def rehearsing(self, machine: Machine) -> Kernel | None:
        """This kernel for a dry run on meta tensors, which finds the launches to compile ahead of time (`warming`).

        machine: the GPU to compile for. None, the default, if the kernel needs no compilation.
        """
        return None

    def decoding(self, device: torch.device) -> Decoding:
        """The kernel for a few new tokens over a cache; by default in plain torch. Its steps must not overlap."""
        from distflash.kernels.reference_decoding import ReferenceDecoding

        return ReferenceDecoding()

    @abstractmethod
    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        """Attend to the keys of a pass, and merge the result into ``into`` (see `Partial`).

        Args:
            q: ``[B, T, H, D]``, the last dimension contiguous. T > 0.
            keys: of each source of the pass, with the last dimension contiguous. K > 0. For queries that see none of
                them, the first pass writes the empty softmax state, as `Partial.fill_identity` does.
            each: if ``first``, start from ``scores.sinks`` or from the identity, otherwise from ``into.running``. If
                ``last``, write ``into.final`` and ``into.lse``, otherwise ``into.running``. With ``live``, each row
                group has these two flags of its own, and rows that are not live are left unchanged.
            into: with ``into.maxima`` (`Problem.max_logits`), the first pass starts from the identity. The last one
                writes the maxima, and then adds the sinks.
        """

    @abstractmethod
    def preprocess(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> BackwardContext:
        """Prepare the backward passes: compute ``delta = rowsum(dout * out) - dlse``, and copy tensors where needed.

        Args:
            q: ``[B, T, H, D]``, out, dout: ``[B, T, H, V]``, with any strides; lse, dlse: ``[B, H, T]``.
        """

    @abstractmethod
    def backward(
        self, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        """Write this pass's dK and dV to ``dkv``, overwriting it, and accumulate dQ. If `Pass.adds`, the caller passes
        a temporary and adds it.

        Args:
            saved: of the queries, from `preprocess`.
            keys: of the pass's source.
            each: if ``first``, dQ of all heads starts from zero, even if `Pass.heads` selects only some; if ``last``,
                ``dq.final`` of all heads is written. ``gradients`` may exclude dQ, or dK and dV, for kernels with
                `Abilities.separate_gradients`.
        """
