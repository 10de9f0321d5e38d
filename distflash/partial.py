"""A partial softmax is a value.

Attention over some of the keys is three sums relative to a maximum ``m``, of which the last two are what anybody wants
to know: ``total = sum exp(s - m)``, ``out = sum exp(s - m) v / total`` and ``lse = m + log(total)``. Two partials over
disjoint keys merge into the partial over both: merging is associative and commutative, with the identity "no key"
(https://arxiv.org/abs/1805.02867, https://arxiv.org/abs/2112.05682; derivation in ``docs/math.md``).

Between hops the sums are kept as they are, undivided. A ring then does the arithmetic of a single loop over all keys,
and its error is that of one, however many ranks there are: nothing is rounded to a short dtype, normalised or taken the
logarithm of before the last hop.

[Note: shapes] B batch, T local queries, H query heads, V head dim of the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """A softmax in the making: sums over some keys of ``exp(s - maximum)``, alone and times the values.

    Attributes:
        maximum: ``[...]``, of the scores; ``-inf`` for no key. A kernel may keep it in base 2 (`Kernel.base`).
        total: ``[...]``, the sum of exponentials; 0 for no key.
        weighted: ``[..., V]``, the sum of exponentials times values; 0 for no key.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    @staticmethod
    def of_scores(scores: Tensor, values: Tensor) -> Softmax:
        """Over the keys of ``scores [..., t, n]`` and ``values [..., n, V]``. Overwrites the scores."""
        maximum = scores.amax(-1)
        p = scores.sub_(_finite(maximum)[..., None]).exp_()
        return Softmax(maximum, p.sum(-1), p @ values)

    def merge(self, other: Softmax, base: float = math.e) -> Softmax:
        """Over the keys of both, which must be disjoint. base: of the exponentials, see `maximum`."""
        maximum = torch.maximum(self.maximum, other.maximum)
        mine, theirs = (_power(base, s.maximum - _finite(maximum)) for s in (self, other))
        return Softmax(
            maximum,
            self.total * mine + other.total * theirs,
            self.weighted * mine[..., None] + other.weighted * theirs[..., None],
        )

    def finish(self, base: float = math.e) -> tuple[Tensor, Tensor]:
        """``(out, lse)``: ``[..., V]`` and ``[...]``. Over no key ``(0, -inf)``, never NaN."""
        return self.weighted * self.inverse_total[..., None], self.lse(base)

    @property
    def inverse_total(self) -> Tensor:
        """What `weighted` is multiplied by in the end; 0 where no key was seen."""
        return torch.where(self.total > 0, 1 / self.total, 0.0)

    def lse(self, base: float = math.e) -> Tensor:
        """The natural log of the sum of exponentials; ``-inf`` where no key was seen."""
        return torch.where(self.total > 0, self.maximum * math.log(base) + self.total.log(), -torch.inf)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What travels where a partial state does."""
        return self.maximum, self.total, self.weighted


@dataclass(frozen=True)
class Partial:
    """The state of one attention call: what the hops have found so far, and where the last one writes the result.

    Attributes:
        final: ``[B, T, H, V]`` in the inputs' dtype, the output, rounded once.
        lse: ``[B, H, T]`` in the accumulator's dtype, natural log; ``-inf`` where a query saw no key.
        running: between hops, ``maximum, total [B, H, T]`` and ``weighted [B, T, H, V]`` in the accumulator's dtype.
            The first hop writes them, later ones merge. None where the only hop is the last.
        counter: int32 ``[2]``, zeros before and after every hop: how the programs of a kernel share out its work.
    """

    final: Tensor
    lse: Tensor
    running: Softmax | None
    counter: Tensor

    @staticmethod
    def empty(q: Tensor, d_v: int, between: bool) -> Partial:
        """Room for queries ``q [B, T, H, D]``, with a state ``between`` passes; only the counter is initialised."""
        B, T, H, _ = q.shape
        dtype = accumulator_dtype(q.dtype)
        rows = [q.new_empty(B, H, T, dtype=dtype) for _ in range(3 if between else 1)]
        weighted = q.new_empty(B, T, H, d_v, dtype=dtype) if between else None
        return Partial(
            final=q.new_empty(B, T, H, d_v),
            lse=rows[0],
            running=None if weighted is None else Softmax(rows[1], rows[2], weighted),
            counter=q.new_zeros(2, dtype=torch.int32),
        )

    def fill_identity(self, sinks: Tensor | None, base: float = math.e) -> None:
        """The state, and the result, over no key (the sinks, if any, took all of the softmax)."""
        self.final.zero_()
        if sinks is None:
            self.lse.fill_(-torch.inf)
        else:
            self.lse.copy_(sinks[None, :, None].expand_as(self.lse))
        if self.running is not None:
            self.running.maximum.copy_(self.lse).div_(math.log(base))
            self.running.total.fill_(0.0 if sinks is None else 1.0)
            self.running.weighted.zero_()

    def merge(self, arrived: tuple[Tensor, ...], base: float) -> None:
        """Take in another rank's state of these queries, over keys that this one does not have: `Softmax.merge`."""
        assert self.running is not None
        own, other = _rows_first(self.running), _rows_first(Softmax(*arrived))
        maximum = torch.maximum(own.maximum, other.maximum)
        mine, theirs = (_power(base, s.maximum - _finite(maximum)) for s in (own, other))
        own.maximum.copy_(maximum)
        own.total.mul_(mine).addcmul_(other.total, theirs)
        own.weighted.mul_(mine[..., None]).addcmul_(other.weighted, theirs[..., None])

    def finish(self, base: float) -> None:
        """The result of the state, rounded once."""
        assert self.running is not None
        state = _rows_first(self.running)
        torch.mul(state.weighted, state.inverse_total[..., None], out=self.final.transpose(1, 2))
        self.lse.copy_(state.lse(base))

    def of_heads(self, heads: slice) -> Partial:
        """The part of some query heads, as views."""
        state = self.running
        return Partial(
            self.final[:, :, heads],
            self.lse[:, heads],
            state and Softmax(state.maximum[:, heads], state.total[:, heads], state.weighted[:, :, heads]),
            self.counter,
        )


def _rows_first(state: Softmax) -> Softmax:
    """``weighted`` as ``[B, H, T, V]``, as `Softmax` has it, a view of that of a `Partial`."""
    return Softmax(state.maximum, state.total, state.weighted.transpose(1, 2))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Partials and gradients accumulate in float32, or in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power(base: float, x: Tensor) -> Tensor:
    return x.exp2() if base == 2 else x.exp()


def _finite(maximum: Tensor) -> Tensor:
    # -inf - -inf is NaN: rows that have seen no key are shifted by 0 and keep exp(-inf) = 0.
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
