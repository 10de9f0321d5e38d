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

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """A softmax in the making: sums over some keys of ``exp(s - maximum)``, alone and times the values.

    Attributes:
        maximum: ``[...]``, of the scores; ``-inf`` for no key. A kernel may keep it in units of its own.
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

    def merge(self, other: Softmax) -> Softmax:
        """Over the keys of both, which must be disjoint."""
        maximum = torch.maximum(self.maximum, other.maximum)
        mine, theirs = ((s.maximum - _finite(maximum)).exp() for s in (self, other))
        return Softmax(
            maximum,
            self.total * mine + other.total * theirs,
            self.weighted * mine[..., None] + other.weighted * theirs[..., None],
        )

    def finish(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)``: ``[..., V]`` and ``[...]``. Over no key ``(0, -inf)``, never NaN."""
        some = self.total > 0
        out = self.weighted * torch.where(some, 1 / self.total, 0.0)[..., None]
        return out, torch.where(some, self.maximum + self.total.log(), -torch.inf)


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
    def empty(q: Tensor, d_v: int, hops: int) -> Partial:
        """Room for a call of ``hops`` hops with queries ``q [B, T, H, D]``; only the counter is initialised."""
        B, T, H, _ = q.shape
        dtype = accumulator_dtype(q.dtype)
        rows = [q.new_empty(B, H, T, dtype=dtype) for _ in range(3 if hops > 1 else 1)]
        weighted = q.new_empty(B, T, H, d_v, dtype=dtype) if hops > 1 else None
        return Partial(
            final=q.new_empty(B, T, H, d_v),
            lse=rows[0],
            running=None if weighted is None else Softmax(rows[1], rows[2], weighted),
            counter=q.new_zeros(2, dtype=torch.int32),
        )

    def fill_identity(self, sinks: Tensor | None) -> None:
        """What a call with no hop at all returns: no key was seen (the sinks, if any, took all of the softmax)."""
        self.final.zero_()
        if sinks is None:
            self.lse.fill_(-torch.inf)
        else:
            self.lse.copy_(sinks[None, :, None].expand_as(self.lse))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Partials and gradients accumulate in float32, or in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _finite(maximum: Tensor) -> Tensor:
    # -inf - -inf is NaN: rows that have seen no key are shifted by 0 and keep exp(-inf) = 0.
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
