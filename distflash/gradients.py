"""The gradients of a call: where each backward pass writes its part, and how the parts add up.

[Note: shapes] B batch, T local queries, K local keys, H query heads, G key/value heads, D head dim of q and k, V of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.exchange import Exchange
from distflash.kernels import Kernel
from distflash.kernels.base import KeyGradient, Keys, QueryGradient, Saved, Scores
from distflash.partial import accumulator_dtype
from distflash.plan import Gradients as Which
from distflash.plan import Pass, Transfer, What

Tensors = tuple[Tensor, ...]


class Gradients:
    """dQ, dK and dV of one call.

    Args:
        exchange: with this rank's keys ``(k, v)`` and queries ``(q, out, lse, dout[, dlse])`` at hand.
        kernel: computes them.
        scores: see `Scores`.
        rounds_keys: whether dK and dV are rounded; else they stay in the accumulator's dtype.
    """

    def __init__(self, exchange: Exchange, kernel: Kernel, scores: Scores, rounds_keys: bool) -> None:
        self.exchange, self.kernel, self.scores, self.plan = exchange, kernel, scores, exchange.plan
        rank = self.plan.rank
        self.kv, self.q = exchange.at_hand[What.KEYS, rank], exchange.at_hand[What.QUERIES, rank][0]
        self.wide = accumulator_dtype(self.q.dtype)
        self.of_rounded_keys = self.kv[0].dtype if rounds_keys else self.wide
        self.of_keys = Sum(self._own_keys(), self.plan.arrivals(What.KEY_GRADIENTS))
        self.of_queries = Sum((self._own_queries(),), self.plan.arrivals(What.QUERY_GRADIENTS))
        exchange.like |= {What.KEY_GRADIENTS: self.of_keys.own, What.QUERY_GRADIENTS: self.of_queries.own}
        exchange.on_arrival |= {What.KEY_GRADIENTS: self.of_keys.add, What.QUERY_GRADIENTS: self.of_queries.add}

    def compute(self, each: Pass, keys: Keys) -> None:
        """Have the kernel compute a pass, and add what it writes to dK and dV where the pass says so."""
        saved, dq = self._context(each.queries)
        if each.gradients is Which.OF_QUERIES:
            nothing = KeyGradient(keys.k[:, :0], keys.v[:, :0])
            self.kernel.backward(saved, keys, each, self.scores, dq, nothing)
            return
        if not each.adds:
            dkv = KeyGradient(*self._buffers(*each.sources))
            self.kernel.backward(saved, keys, each, self.scores, dq, dkv)
            return
        part = KeyGradient(*(x.new_empty(x.shape, dtype=self.wide) for x in (keys.k, keys.v)))
        self.kernel.backward(saved, keys, each, self.scores, dq, part)
        heads = each.heads or range(keys.k.shape[2])
        for total, x in zip(self._buffers(*each.sources), (part.dk, part.dv), strict=True):
            some = x[:, :, heads.start : heads.stop]
            total[:, keys.rows.keys.start : keys.rows.keys.stop, heads.start : heads.stop] += some

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, rounded once."""
        (dq,) = self.of_queries.finish(self.q.dtype)
        dk, dv = self.of_keys.finish(self.of_rounded_keys)
        return dq, dk, dv

    def of_sinks(self) -> Tensor | None:
        """A sink has probability ``exp(sink - lse)`` and value 0, so its gradient is ``-sum(probability * delta)``."""
        sinks = self.scores.sinks
        if sinks is None:
            return None
        saved, _ = self._context(self.plan.rank)
        # Where nothing was seen and the sink is -inf, lse is too: a probability of 0, not of exp(-inf + inf).
        lse = saved.lse.masked_fill(saved.lse == -torch.inf, 0.0)
        probability = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
        return -(probability * saved.delta).sum((0, 2)).to(sinks.dtype)

    def _context(self, queries: int) -> tuple[Saved, QueryGradient]:
        """What the kernel knows of a rank's queries, and where their dQ goes."""
        name = What.QUERIES, queries
        if name not in self.exchange.derived:
            tensors = self.exchange.at_hand[name]
            q = tensors[0]
            saved = self.kernel.save(*tensors, *(None,) * (5 - len(tensors)))
            final = self._own if queries == self.plan.rank else q.new_empty(q.shape, dtype=self.wide)
            kept = self.plan.keeps_sums(queries) and saved.sums is None
            between = q.new_empty(q.shape, dtype=self.wide) if kept else None
            self.exchange.derived[name] = saved, QueryGradient(final, between)
            self.exchange.at_hand[What.QUERY_GRADIENTS, queries] = (final,)
        context: tuple[Saved, QueryGradient] = self.exchange.derived[name]
        return context

    def _own_queries(self) -> Tensor:
        dtype = self.wide if self.plan.arrivals(What.QUERY_GRADIENTS) else self.q.dtype
        self._own = self.q.new_empty(self.q.shape, dtype=dtype)
        return self._own if self.plan.own_passes else self._own.zero_()

    def _own_keys(self) -> Tensors:
        """Buffers in the dtype in which this rank's own part is written: float32 where others are added to it."""
        dtype = self.wide if self.plan.adds_to_own_keys else self.of_rounded_keys
        buffers = tuple(x.new_empty(x.shape, dtype=dtype) for x in self.kv)
        self.exchange.at_hand[What.KEY_GRADIENTS, self.plan.rank] = buffers
        return buffers if self.plan.works_on_own_keys else tuple(x.zero_() for x in buffers)

    def _buffers(self, source: int) -> Tensors:
        """Where dK and dV of a source's keys at hand are written."""
        name = What.KEY_GRADIENTS, source
        if name not in self.exchange.at_hand:
            keys = self.exchange.at_hand[What.KEYS, source]
            self.exchange.at_hand[name] = tuple(x.new_empty(x.shape, dtype=self.wide) for x in keys)
        return self.exchange.at_hand[name]


class Sum:
    """This rank's own part of a gradient, and parts of other ranks, added in the order in which they arrive.

    Args:
        own: buffers with this rank's own part.
        arrivals: how many parts are to come.
    """

    def __init__(self, own: Tensors, arrivals: int) -> None:
        self.own, self.arrivals = own, arrivals
        self._last: Tensors | None = None

    def add(self, transfer: Transfer, parts: Tensors) -> None:
        """Add a part to the tokens that it is of. The last one, if it is of all tokens, waits for `finish`."""
        self.arrivals -= 1
        tokens = self.own[0].shape[1]
        rows = transfer.rows or (range(tokens),)
        if not self.arrivals and rows == (range(tokens),):
            self._last = parts
            return
        for own, part in zip(self.own, parts, strict=True):
            start = 0
            for r in rows:
                own[:, r.start : r.stop] += part[:, start : start + len(r)]
                start += len(r)

    def finish(self, dtype: torch.dtype) -> Tensors:
        """The sums, rounded once."""
        if self._last is None:
            return tuple(own.to(dtype) for own in self.own)
        # The last addition and the only rounding are one pass.
        outs = tuple(own.new_empty(own.shape, dtype=dtype) for own in self.own)
        return tuple(torch.add(*pair, out=out) for *pair, out in zip(self.own, self._last, outs, strict=True))
