"""The gradients of a call: the buffers that backward passes write, and the sums of the ranks' parts.

[Note: shapes] B batch, T local queries, K local keys, H query heads, G key/value heads, D head dim of q and k, V of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.exchange import Exchange
from distflash.kernels import Kernel
from distflash.kernels.base import BackwardContext, KeyGradient, Keys, QueryGradient, Scores
from distflash.partial import accumulator_dtype
from distflash.plan import Gradients, Pass, Transfer, What

Tensors = tuple[Tensor, ...]


class GradientBuffers:
    """dQ, dK and dV of one call.

    Args:
        exchange: its tensors are this rank's keys ``(k, v)`` and queries ``(q, out, lse, dout[, dlse])``.
        kernel: computes the passes.
        scores: see `Scores`.
        rounds_keys: see `engine.Call`.
    """

    def __init__(self, exchange: Exchange, kernel: Kernel, scores: Scores, rounds_keys: bool) -> None:
        self.exchange, self.kernel, self.scores, self.plan = exchange, kernel, scores, exchange.plan
        rank = self.plan.rank
        self.kv, self.q = exchange.tensors[What.KEYS, rank], exchange.tensors[What.QUERIES, rank][0]
        self.accumulator = accumulator_dtype(self.q.dtype)
        self.keys_dtype = self.kv[0].dtype if rounds_keys else self.accumulator
        self.of_keys = Sum(self._own_keys(), self.plan.arrivals[What.KEY_GRADIENTS])
        self.of_queries = Sum((self._own_queries(),), self.plan.arrivals[What.QUERY_GRADIENTS])
        exchange.prototypes |= {What.KEY_GRADIENTS: self.of_keys.own, What.QUERY_GRADIENTS: self.of_queries.own}
        exchange.on_arrival |= {What.KEY_GRADIENTS: self.of_keys.add, What.QUERY_GRADIENTS: self.of_queries.add}

    def compute(self, each: Pass, keys: Keys) -> None:
        """Run the kernel for a pass. If `Pass.adds`, its dK and dV are added to the buffers of its source."""
        saved, dq = self._context(each.queries)
        if each.gradients is Gradients.OF_QUERIES:
            nothing = KeyGradient(keys.k[:, :0], keys.v[:, :0])
            self.kernel.backward(saved, keys, each, self.scores, dq, nothing)
            return
        if not each.adds:
            dkv = KeyGradient(*self._buffers(*each.sources))
            self.kernel.backward(saved, keys, each, self.scores, dq, dkv)
            return
        part = KeyGradient(*_like((keys.k, keys.v), self.accumulator))
        self.kernel.backward(saved, keys, each, self.scores, dq, part)
        rows, heads = keys.rows.keys, each.heads
        for total, x in zip(self._buffers(*each.sources), (part.dk, part.dv), strict=True):
            of_rows = total.narrow(1, rows.start, len(rows))
            if heads is not None:
                of_rows, x = of_rows.narrow(2, heads.start, len(heads)), x.narrow(2, heads.start, len(heads))
            of_rows.add_(x)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, rounded once."""
        (dq,) = self.of_queries.finish(self.q.dtype)
        dk, dv = self.of_keys.finish(self.keys_dtype)
        return dq, dk, dv

    def of_sinks(self, sinks: Tensor) -> Tensor:
        """The gradient of the sinks from this rank's queries."""
        saved, _ = self._context(self.plan.rank)
        return of_sinks(saved, sinks).to(sinks.dtype)

    def _context(self, queries: int) -> tuple[BackwardContext, QueryGradient]:
        """The backward context of a rank's queries, and the buffers of their dQ."""
        name = What.QUERIES, queries
        if name not in self.exchange.derived:
            tensors = self.exchange.tensors[name]
            q = tensors[0]
            saved = self.kernel.preprocess(*tensors, *(None,) * (5 - len(tensors)))
            final = self._own if queries == self.plan.rank else q.new_empty(q.shape, dtype=self.accumulator)
            needs_sum = saved.dq_accum is None and self.plan.keeps_sums(queries)
            total = q.new_empty(q.shape, dtype=self.accumulator) if needs_sum else None
            self.exchange.derived[name] = saved, QueryGradient(final, total)
            self.exchange.tensors[What.QUERY_GRADIENTS, queries] = (final,)
        context: tuple[BackwardContext, QueryGradient] = self.exchange.derived[name]
        return context

    def _own_queries(self) -> Tensor:
        dtype = self.accumulator if self.plan.arrivals[What.QUERY_GRADIENTS] else self.q.dtype
        self._own = torch.empty_like(self.q, dtype=dtype, memory_format=torch.contiguous_format)
        return self._own if self.plan.own_passes else self._own.zero_()

    def _own_keys(self) -> Tensors:
        """Buffers for dK and dV of the local keys: in the accumulator's dtype if other parts are added to them."""
        dtype = self.accumulator if self.plan.adds_to_own_keys else self.keys_dtype
        buffers = _like(self.kv, dtype)
        self.exchange.tensors[What.KEY_GRADIENTS, self.plan.rank] = buffers
        return buffers if self.plan.works_on_own_keys else tuple(x.zero_() for x in buffers)

    def _buffers(self, source: int) -> Tensors:
        """Buffers for dK and dV of a source's keys."""
        name = What.KEY_GRADIENTS, source
        if name not in self.exchange.tensors:
            keys = self.exchange.tensors[What.KEYS, source]
            self.exchange.tensors[name] = _like(keys, self.accumulator)
        return self.exchange.tensors[name]


def of_sinks(saved: BackwardContext, sinks: Tensor) -> Tensor:
    """The gradient of the sinks from the queries of a backward context: ``[H]``, in the accumulator's dtype.

    A sink has probability ``exp(sink - lse)`` and value 0, so its gradient is ``-sum(probability * delta)``.
    """
    # For rows with no visible key and a sink of -inf, lse is -inf: the probability is 0, not exp(-inf + inf).
    lse = saved.lse.masked_fill(saved.lse == -torch.inf, 0.0)
    probability = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    return -(probability * saved.delta).sum((0, 2))


def _like(keys: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Buffers for what is of the same shapes as k and v. `empty_like` takes half the time of `new_empty` of a shape."""
    k, v = keys
    dense = torch.contiguous_format
    return (
        torch.empty_like(k, dtype=dtype, memory_format=dense),
        torch.empty_like(v, dtype=dtype, memory_format=dense),
    )


class Sum:
    """The sum of this rank's part of a gradient and the parts of other ranks, added in the order of the plan.

    Args:
        own: buffers with this rank's part.
        arrivals: the number of parts to receive.
    """

    def __init__(self, own: Tensors, arrivals: int) -> None:
        self.own, self.arrivals = own, arrivals
        self._last: Tensors | None = None

    def add(self, transfer: Transfer, parts: Tensors) -> None:
        """Add a received part to the rows of its tokens. If the last part covers all tokens, `finish` adds it."""
        self.arrivals -= 1
        tokens = self.own[0].shape[1]
        rows = transfer.rows or (range(tokens),)
        if not self.arrivals and rows == (range(tokens),):
            self._last = parts
            return
        for own, part in zip(self.own, parts, strict=True):
            start = 0
            for r in rows:
                own.narrow(1, r.start, len(r)).add_(part.narrow(1, start, len(r)))
                start += len(r)

    def finish(self, dtype: torch.dtype) -> Tensors:
        """The sums, rounded once."""
        if self._last is None:
            return self.own if self.own[0].dtype is dtype else tuple([own.to(dtype) for own in self.own])
        # The last addition and the only rounding are one pass over memory.
        outs = [own.new_empty(own.shape, dtype=dtype) for own in self.own]
        return tuple([torch.add(*pair, out=out) for *pair, out in zip(self.own, self._last, outs, strict=True)])
