"""The heart: forward and backward of attention, by a plan.

A plan's stages come one after the other. While the transfers of a stage run, the kernel computes its passes: forward,
each merges what its queries see of its keys into their partial softmax; backward, each adds to dQ and writes dK and dV.

[Note: shapes] B batch, T local queries, K local keys, H query heads, G key/value heads, D head dim of q and k, V of v.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distflash.exchange import Exchange, Tensors
from distflash.gradients import Gradients
from distflash.kernels import Kernel
from distflash.kernels.base import Keys, Scores
from distflash.partial import Partial
from distflash.plan import Pass, Plan, What
from distflash.transport import Exchanges


@dataclass(frozen=True)
class Call:
    """All that one attention call is, but for its tensors.

    Attributes:
        plan: of this rank.
        transport: reaches the ranks of the plan.
        kernel: computes the passes.
        scores: how scores are formed.
        rounds_keys: whether dK and dV are rounded to the keys' dtype; else they stay in the accumulator's.
    """

    plan: Plan
    transport: Exchanges
    kernel: Kernel
    scores: Scores
    rounds_keys: bool = True


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Exact attention of this rank's queries over all ranks' keys.

    Args:
        q: ``[B, T, H, D]``, k: ``[B, K, G, D]``, v: ``[B, K, G, V]``, k and v contiguous.

    Returns:
        out ``[B, T, H, V]`` in q's dtype, lse ``[B, H, T]`` in the accumulator's dtype.
    """
    plan, base = call.plan, call.kernel.base
    own = Partial.empty(q, v.shape[-1], between=plan.keeps_partials)
    if not q.shape[0]:  # on every rank: nothing to attend to and nothing to send
        return own.final, own.lse
    if not plan.own_passes:
        own.fill_identity(call.scores.sinks, base)
    q = q.contiguous() if plan.moves_queries else q
    exchange = Exchange(plan, call.transport, {What.KEYS: (k, v), What.QUERIES: (q,)})
    exchange.at_hand |= {(What.KEYS, plan.rank): (k, v), (What.QUERIES, plan.rank): (q,)}
    exchange.derived[What.QUERIES, plan.rank] = own
    # Sinks are taken in by the queries' own rank.
    of_others = replace(call.scores, sinks=None) if plan.moves_queries else call.scores
    if own.running is not None:
        exchange.like[What.PARTIALS] = own.running.tensors
        exchange.on_arrival[What.PARTIALS] = lambda _, arrived: own.merge(arrived, base)
    for stage in exchange.walk(plan.forward, plan.done_with[0]):
        for each in stage.passes:
            (queries,) = exchange.at_hand[What.QUERIES, each.queries]
            scores = call.scores if each.queries == plan.rank else of_others
            into = state_of(each, exchange, v.shape[-1])
            call.kernel.forward(queries, keys_of(each, exchange), each, scores, into)
    if plan.merges:
        own.finish(base)
    return own.final, own.lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients ``(dq, dk, dv, dsinks)`` of `forward`; dsinks is None without sinks.

    The final lse makes passes independent of one another: each recomputes its probabilities from it.
    """
    plan, sinks = call.plan, call.scores.sinks
    if not q.shape[0]:
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks
    if plan.moves_queries and dlse is None:  # what travels is alike on all ranks
        dlse = torch.zeros_like(lse)
    queries: Tensors = (q, out, lse, dout) if dlse is None else (q, out, lse, dout, dlse)
    queries = tuple(x.contiguous() for x in queries) if plan.moves_queries else queries
    exchange = Exchange(plan, call.transport, {What.KEYS: (k, v), What.QUERIES: queries})
    exchange.at_hand |= {(What.KEYS, plan.rank): (k, v), (What.QUERIES, plan.rank): queries}
    gradients = Gradients(exchange, call.kernel, call.scores, call.rounds_keys)
    for stage in exchange.walk(plan.backward, plan.done_with[1]):
        for each in stage.passes:
            gradients.compute(each, *keys_of(each, exchange))  # held by nobody else: they are soon given up
    return *gradients.finish(), gradients.of_sinks()


def state_of(each: Pass, exchange: Exchange, d_v: int) -> Partial:
    """The softmax of the pass's queries; that of another rank's begins here, and goes back to it."""
    name = What.QUERIES, each.queries
    if name not in exchange.derived:
        (queries,) = exchange.at_hand[name]
        guest = Partial.empty(queries, d_v, between=True)
        assert guest.running is not None
        exchange.at_hand[What.PARTIALS, each.queries] = guest.running.tensors
        exchange.derived[name] = guest
    partial: Partial = exchange.derived[name]
    return partial


def keys_of(each: Pass, exchange: Exchange) -> tuple[Keys, ...]:
    """The keys of each source that the pass is about."""
    return tuple(
        Keys(*exchange.keys(source, rows.keys), rows) for source, rows in zip(each.sources, each.visible, strict=True)
    )
