"""Forward and backward of attention: the execution of a plan.

Stages run in order. While the transfers of a stage are in flight, the kernel computes the stage's passes. A pass is one
kernel call. In forward it attends to the K/V of its source ranks and updates the online-softmax state; in backward it
accumulates dQ and computes dK and dV of its source rank.

[Note: shapes] B batch, T local queries, K local keys, H query heads, G key/value heads, D head dim of q and k, V of v.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distflash.exchange import Exchange, Tensors
from distflash.gradients import GradientBuffers
from distflash.kernels import Kernel
from distflash.kernels.base import Keys, Scores
from distflash.partial import Partial
from distflash.plan import Pass, Plan, What
from distflash.profiling import with_profiler_ranges
from distflash.transport import PointToPoint


@dataclass(frozen=True)
class Call:
    """What the engine needs for an attention call besides q, k and v.

    Attributes:
        plan: of this rank.
        transport: reaches the ranks of the plan.
        kernel: computes the passes. Its ``base``, e or 2, is that of the exponentials in the running softmax.
        scores: how scores are formed.
        rounds_keys: whether dK and dV are rounded to the keys' dtype; otherwise they stay in the accumulator's dtype.
        max_logits: whether forward also finds the largest score of each head.
    """

    plan: Plan
    transport: PointToPoint
    kernel: Kernel
    scores: Scores
    rounds_keys: bool = True
    max_logits: bool = False


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact attention of this rank's queries over all ranks' keys.

    Args:
        q: ``[B, T, H, D]``, k: ``[B, K, G, D]``, v: ``[B, K, G, V]``, k and v contiguous.

    Returns:
        out ``[B, T, H, V]`` in q's dtype, lse ``[B, H, T]`` in the accumulator's dtype. Third, the largest score of
        each head over this rank's queries, ``[H]`` in the same dtype; None without ``call.max_logits``.
    """
    plan, kernel, transport = call.plan, call.kernel, call.transport
    if torch.autograd._profiler_enabled():
        kernel, transport = with_profiler_ranges(kernel, transport, plan.forward, "forward")
    # between: whether a running state is kept between passes
    own = Partial.empty(q, v.shape[-1], between=plan.keeps_partials, maxima=call.max_logits)
    if not q.shape[0]:  # a batch of 0, on every rank: nothing to compute or send
        return own.final, own.lse, own.max_logits(kernel.base) if call.max_logits else None
    if not plan.own_passes:
        own.fill_identity(call.scores.sinks, kernel.base)
    q = q.contiguous() if plan.moves_queries else q
    exchange = Exchange(plan, transport, {What.KEYS: (k, v), What.QUERIES: (q,)})
    exchange.tensors |= {(What.KEYS, plan.rank): (k, v), (What.QUERIES, plan.rank): (q,)}
    # Only the rank that holds the queries adds the sinks.
    remote_scores = replace(call.scores, sinks=None) if plan.moves_queries else call.scores
    if own.running is not None:
        exchange.prototypes[What.PARTIALS] = own.running.tensors  # the shapes and dtypes of what is received
        exchange.on_arrival[What.PARTIALS] = lambda _, arrived: own.merge(arrived, kernel.base)
    for stage in exchange.walk(plan.forward, plan.done_with[0]):
        for each in stage.passes:
            (queries,) = exchange.tensors[What.QUERIES, each.queries]
            local = each.queries == plan.rank
            scores, into = (call.scores, own) if local else (remote_scores, state_of(each, exchange, v.shape[-1]))
            kernel.forward(queries, keys_of(each, exchange), each, scores, into)
    if plan.merges:
        own.finish(kernel.base, call.scores.sinks)
    return own.final, own.lse, own.max_logits(kernel.base) if call.max_logits else None


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients ``(dq, dk, dv, dsinks)`` of `forward`; dsinks is None without sinks.

    Each pass recomputes its probabilities from the final lse, so passes do not depend on one another.
    """
    plan, kernel, transport = call.plan, call.kernel, call.transport
    if not q.shape[0]:
        dsinks = None if call.scores.sinks is None else torch.zeros_like(call.scores.sinks)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks
    if torch.autograd._profiler_enabled():
        kernel, transport = with_profiler_ranges(kernel, transport, plan.backward, "backward")
    if plan.moves_queries and dlse is None:
        # All ranks send the same number of tensors. Another rank may have a dlse, so a rank without one sends zeros.
        dlse = torch.zeros_like(lse)
    queries: Tensors = (q, out, lse, dout) if dlse is None else (q, out, lse, dout, dlse)
    queries = tuple(x.contiguous() for x in queries) if plan.moves_queries else queries
    exchange = Exchange(plan, transport, {What.KEYS: (k, v), What.QUERIES: queries})
    exchange.tensors |= {(What.KEYS, plan.rank): (k, v), (What.QUERIES, plan.rank): queries}
    gradients = GradientBuffers(exchange, kernel, call.scores, call.rounds_keys)
    for stage in exchange.walk(plan.backward, plan.done_with[1]):
        for each in stage.passes:
            gradients.compute(each, *keys_of(each, exchange))  # no local variable, so that received keys can be freed
    return *gradients.finish(), None if call.scores.sinks is None else gradients.of_sinks(call.scores.sinks)


def state_of(each: Pass, exchange: Exchange, d_v: int) -> Partial:
    """The running softmax of another rank's queries, which this rank starts and sends back."""
    name = What.QUERIES, each.queries
    if name not in exchange.derived:
        (queries,) = exchange.tensors[name]
        remote = Partial.empty(queries, d_v, between=True)
        assert remote.running is not None
        exchange.tensors[What.PARTIALS, each.queries] = remote.running.tensors
        exchange.derived[name] = remote
    partial: Partial = exchange.derived[name]
    return partial


def keys_of(each: Pass, exchange: Exchange) -> tuple[Keys, ...]:
    """K and V of each source of the pass."""
    if len(each.sources) == 1:
        (source,), (visible,) = each.sources, each.visible
        return (Keys(*exchange.keys(source, visible.keys), visible),)
    both = zip(each.sources, each.visible, strict=True)
    return tuple([Keys(*exchange.keys(source, visible.keys), visible) for source, visible in both])
