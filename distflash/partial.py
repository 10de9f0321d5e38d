"""Partial softmax: the state of an online softmax over some of the keys, and its merge.

The state is the maximum ``m`` of the scores ``s``, ``total = sum exp(s - m)``, and ``weighted = sum exp(s - m) v``.
From it follow ``out = weighted / total`` and ``lse = m + log(total)``. The states of two disjoint sets of keys merge
into the state of their union. The merge is associative and commutative. Its identity element is the state of an empty
set of keys (https://arxiv.org/abs/1805.02867, https://arxiv.org/abs/2112.05682; derivation in ``docs/math.md``).

Between passes the state stays in float32, and O is not normalised: only the last pass divides, takes the logarithm and
rounds to the inputs' dtype. So the rounding error does not grow with the number of ranks.

[Note: shapes] B batch, T local queries, H query heads, V head dim of the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """The running state of an online softmax.

    Attributes:
        maximum: ``[...]``, of the scores; ``-inf`` without keys. Kernels that use exp2 multiply it by log2(e), see
            `Kernel.base`.
        total: ``[...]``, the sum of exponentials; 0 without keys.
        weighted: ``[..., V]``, the sum of exponentials times values; 0 without keys.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    @staticmethod
    def of_scores(scores: Tensor, values: Tensor, dropped: Tensor | None = None) -> Softmax:
        """The state of the keys of ``scores [..., t, n]`` and ``values [..., n, V]``. Overwrites the scores.

        dropped: ``[..., t, n]``, factors of the exponentials in `weighted`: 0 where dropped, else `Dropout.keep_scale`.
        """
        maximum = scores.amax(-1)
        p = scores.sub_(_finite(maximum)[..., None]).exp_()
        total = p.sum(-1)
        return Softmax(maximum, total, (p if dropped is None else p.mul_(dropped)) @ values)

    def merge(self, other: Softmax, base: float = math.e) -> Softmax:
        """The state over the keys of both, which must be disjoint. base: the kernel's, e or 2."""
        maximum = torch.maximum(self.maximum, other.maximum)
        a, b = (_power(base, s.maximum - _finite(maximum)) for s in (self, other))
        return Softmax(
            maximum,
            self.total * a + other.total * b,
            self.weighted * a[..., None] + other.weighted * b[..., None],
        )

    def finish(self, base: float = math.e) -> tuple[Tensor, Tensor]:
        """``(out, lse)``: ``[..., V]`` and ``[...]``. Without keys ``(0, -inf)``, never NaN."""
        return self.weighted * self.inverse_total[..., None], self.lse(base)

    def with_sinks(self, sinks: Tensor, base: float = math.e) -> Softmax:
        """The state with one more logit, without a value. sinks: in base e, broadcast against `maximum`."""
        sink = (sinks.to(self.maximum.dtype) / math.log(base)).expand_as(self.maximum)
        return self.merge(Softmax(sink, torch.ones_like(sink), self.weighted.new_zeros(())), base)

    @property
    def inverse_total(self) -> Tensor:
        """``1 / total``; 0 without keys."""
        return torch.where(self.total > 0, 1 / self.total, 0.0)

    def lse(self, base: float = math.e) -> Tensor:
        """The natural log of the sum of exponentials; ``-inf`` without keys."""
        return torch.where(self.total > 0, self.maximum * math.log(base) + self.total.log(), -torch.inf)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors, in the order in which they are sent to other ranks."""
        return self.maximum, self.total, self.weighted


@dataclass(frozen=True)
class Partial:
    """The buffers of one attention call: the running state between passes, and the result that the last pass writes.

    Attributes:
        final: ``[B, T, H, V]`` in the inputs' dtype, the output, rounded once.
        lse: ``[B, H, T]`` in the accumulator's dtype, natural log; ``-inf`` for queries with no visible key.
        running: between passes, ``maximum, total [B, H, T]`` and ``weighted [B, T, H, V]`` in the accumulator's dtype.
            The first pass writes them, later ones merge. None if there is only one pass.
        counter: int32 ``[2]``, zeros before and after every pass: the atomic counter of a kernel's tile scheduler.
        maxima: ``[B, H, T]`` if the call asks for the largest scores, else None. After a row's last pass it holds the
            row's largest score, without sinks, times log2(e) if `Kernel.base` is 2; ``-inf`` without keys. To keep
            sinks out of it, they are added in the last pass instead of the first. With a running state, ``maxima`` and
            ``running.maximum`` are the same tensor.
    """

    final: Tensor
    lse: Tensor
    running: Softmax | None
    counter: Tensor
    maxima: Tensor | None = None

    @staticmethod
    def empty(q: Tensor, d_v: int, between: bool, maxima: bool = False) -> Partial:
        """Buffers for queries ``q [B, T, H, D]``, with a running state if ``between``.

        Only the counter (with 0) and the maxima (with -inf) are initialised.
        """
        B, T, H, _ = q.shape
        dtype = accumulator_dtype(q.dtype)
        lse = q.new_empty(B, H, T, dtype=dtype)
        running = None
        if between:
            weighted = q.new_empty(B, T, H, d_v, dtype=dtype)
            running = Softmax(torch.empty_like(lse), torch.empty_like(lse), weighted)
        largest = None
        if maxima:
            largest = (torch.empty_like(lse) if running is None else running.maximum).fill_(-torch.inf)
        counter = q.new_zeros(2, dtype=torch.int32)
        return Partial(q.new_empty(B, T, H, d_v), lse, running, counter, largest)

    @property
    def maximum(self) -> Tensor | None:
        """The buffer of row maxima. All passes but the last write it; with `maxima` the last one, too."""
        return self.maxima if self.running is None else self.running.maximum

    def fill_identity(self, sinks: Tensor | None, base: float = math.e) -> None:
        """Initialise to the state without keys: out = 0, and lse = -inf or, with sinks, the sink logit."""
        self.final.zero_()
        if sinks is None:
            self.lse.fill_(-torch.inf)
        else:
            self.lse.copy_(sinks[None, :, None].expand_as(self.lse))
        if self.running is not None:
            if sinks is None or self.maxima is not None:  # if there are maxima, `finish` adds the sinks
                self.running.maximum.fill_(-torch.inf)
                self.running.total.zero_()
            else:
                self.running.maximum.copy_(self.lse).div_(math.log(base))
                self.running.total.fill_(1.0)
            self.running.weighted.zero_()

    def merge(self, arrived: tuple[Tensor, ...], base: float) -> None:
        """Merge in a state of the same queries that another rank computed over other keys. See `Softmax.merge`."""
        assert self.running is not None
        own, other = _heads_first(self.running), _heads_first(Softmax(*arrived))
        maximum = torch.maximum(own.maximum, other.maximum)
        a, b = (_power(base, s.maximum - _finite(maximum)) for s in (own, other))
        own.maximum.copy_(maximum)
        own.total.mul_(a).addcmul_(other.total, b)
        own.weighted.mul_(a[..., None]).addcmul_(other.weighted, b[..., None])

    def finish(self, base: float, sinks: Tensor | None = None) -> None:
        """Write the result of the running state, rounded once.

        sinks: ``[H]``, which are added here if there are `maxima`; otherwise the state contains them already.
        """
        assert self.running is not None
        state = _heads_first(self.running)
        if self.maxima is not None and sinks is not None:
            state = state.with_sinks(sinks[:, None], base)
        torch.mul(state.weighted, state.inverse_total[..., None], out=self.final.transpose(1, 2))
        self.lse.copy_(state.lse(base))

    def max_logits(self, base: float) -> Tensor:
        """``[H]``, the largest of the scores of each head, from `maxima`; -inf where no key is seen."""
        assert self.maxima is not None
        if not self.maxima.numel():
            return self.maxima.new_full((self.maxima.shape[1],), -torch.inf)
        return self.maxima.amax((0, 2)) * math.log(base)

    def of_heads(self, heads: slice) -> Partial:
        """The buffers of these query heads, as views."""
        state = self.running
        return Partial(
            self.final[:, :, heads],
            self.lse[:, heads],
            state and Softmax(state.maximum[:, heads], state.total[:, heads], state.weighted[:, :, heads]),
            self.counter,
            None if self.maxima is None else self.maxima[:, heads],
        )


def _heads_first(state: Softmax) -> Softmax:
    """A view of the state with ``weighted`` as ``[B, H, T, V]``."""
    return Softmax(state.maximum, state.total, state.weighted.transpose(1, 2))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Partials and gradients accumulate in float32, or in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power(base: float, x: Tensor) -> Tensor:
    return x.exp2() if base == 2 else x.exp()


def _finite(maximum: Tensor) -> Tensor:
    # -inf - -inf is NaN: for rows with no visible key, 0 is subtracted instead, and exp(-inf) = 0.
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
