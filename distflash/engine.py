"""The heart: forward and backward over a schedule.

[Note: shapes] B batch, T local queries, K local keys, H query heads, G key/value heads, D head dim of q and k, V of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial as bind

import torch
from torch import Tensor

from distflash.intervals import Intervals, Sharding, build, count_pairs
from distflash.kernels import Kernel
from distflash.kernels.base import Hop, KeyGradient, Keys, Pairing, QueryGradient, Saved, Scores
from distflash.partial import Partial, accumulator_dtype
from distflash.schedules import Schedule, Step, Trip
from distflash.transport import Transport

KeyValue = tuple[Tensor, ...]

# Of the key heads, those that do not wait for the first keys: enough to work under an exchange between near ranks.
SHARE_FIRST = 0.25


@dataclass(frozen=True)
class Options:
    """What a call carries beside q, k and v.

    Attributes:
        seq_len: the global length S; None where the mask knows it or all ranks hold equally many tokens.
        sinks: ``[H]`` or None.
        alibi_slopes: ``[H]`` or None.
    """

    seq_len: int | None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What one rank does in a call, known before any data: built once per mask, layout and length.

    Attributes:
        steps: of the schedule, with the steps that no rank needs left out.
        intervals: for each owner that this rank works on, one or more (see `intervals.build`): a kernel pass for each.
        lengths: local tokens of every rank.
        pairs: int64 ``[W, W]``, allowed (query, key) pairs of each rank with each owner.
    """

    steps: tuple[Step, ...]
    intervals: Mapping[int, tuple[Intervals, ...]]
    lengths: tuple[int, ...]
    pairs: Tensor

    @staticmethod
    def build(sharding: Sharding, schedule: Schedule, rank: int, device: torch.device) -> Plan:
        pairs = count_pairs(sharding)
        steps = schedule.steps((pairs > 0).tolist(), rank)
        owners = [step.owner for step in steps if step.works]
        return Plan(
            steps=steps,
            intervals={owner: tuple(x.to(device) for x in build(sharding, rank, owner)) for owner in owners},
            lengths=tuple(sharding.length(r) for r in range(sharding.world_size)),
            pairs=pairs,
        )

    @property
    def hops(self) -> int:
        """How many times keys move between ranks: the steps beyond each rank's own keys."""
        return len(self.steps) - 1

    @property
    def working(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.works)

    @property
    def passes(self) -> int:
        """How many times a kernel runs over this rank's queries: once for each part of the mask and working step."""
        return sum(map(len, self.intervals.values()))


@dataclass(frozen=True)
class Call:
    """All that one attention call is, but for its tensors."""

    plan: Plan
    schedule: Schedule
    transport: Transport
    kernel: Kernel
    scores: Scores

    @property
    def trip(self) -> Trip:
        return Trip(self.plan.steps, self.plan.lengths, self.transport)

    def heads_first(self, kv_heads: int) -> int:
        """How many key heads attend to this rank's own keys before the first keys arrive; the others take both at once.

        0 where all heads take the keys of one owner after the other: where there is nothing to wait for, where the mask
        has several parts, or where keys may be on their way for longer than so few heads have work.
        """
        some, working = math.ceil(kv_heads * SHARE_FIRST), self.plan.working
        starts = 1 < len(working) == self.plan.passes and working[0].owner == self.transport.rank
        return some if starts and some < kv_heads and self.transport.near else 0

    def heads_apart(self, k: Tensor, enough: int) -> int:
        """How many key heads work backward on this rank's own keys first; the others come last, under the way home.

        0 where all do so first: where keys are not near (`heads_first`), where those heads do not have ``enough`` keys
        (see `Pairing`), or where another rank's part of the gradients arrives before the last step. Such a part is
        added to the buffer of the own gradients, which the heads that come last would then overwrite.
        """
        some = self.heads_first(k.shape[2])
        added_before_the_end = any(step.home_from is not None for step in self.plan.steps[:-1])
        return some if not added_before_the_end and k.shape[0] * k.shape[1] * some >= enough else 0

    def visit(self, kv: KeyValue) -> Iterator[tuple[Step, Hop, KeyValue]]:
        """The steps of the schedule with their keys, and where among the working ones each stands."""
        working = self.plan.working
        for step, held in self.schedule.visit(self.trip, kv):
            yield step, Hop(first=step is working[0], last=step is working[-1]) if step.works else _IDLE, held


_IDLE = Hop(first=False, last=False)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Exact attention of this rank's queries over all ranks' keys.

    Args:
        q: ``[B, T, H, D]``, k: ``[B, K, G, D]``, v: ``[B, K, G, V]``, k and v contiguous.

    Returns:
        out ``[B, T, H, V]`` in q's dtype, lse ``[B, H, T]`` in the accumulator's dtype.
    """
    hops = call.plan.passes
    partial = Partial.empty(q, v.shape[-1], hops)
    if not q.shape[0]:  # on every rank: nothing to attend to and nothing to send
        return partial.final, partial.lse
    if not hops:
        partial.fill_identity(call.scores.sinks)
    pair = call.kernel if isinstance(call.kernel, Pairing) else None
    some, own = call.heads_first(k.shape[2]) if pair else 0, None
    for step, hop, (k_held, v_held) in call.visit((k, v)):
        if not step.works:
            continue
        parts = call.plan.intervals[step.owner]
        keys = Keys(k_held, v_held, parts[0])
        if pair and some and hop.first:
            pair.forward_some(q, keys, call.scores, some, into=partial)
            own = keys
        elif pair and own:
            pair.forward_both(q, own, keys, call.scores, some, hop.last, into=partial)
            own = None
        else:
            for rows, place in _passes(parts, hop):
                k_seen, v_seen = _of(rows, k_held), _of(rows, v_held)
                call.kernel.forward(q, k_seen, v_seen, rows, call.scores, place, into=partial)
    return partial.final, partial.lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients ``(dq, dk, dv, dsinks)`` of `forward`; dsinks is None without sinks.

    The final lse makes hops independent of one another: each recomputes its probabilities from it.
    """
    if not q.shape[0]:
        sinks = call.scores.sinks
        return (
            q.new_empty(q.shape),
            k.new_empty(k.shape),
            v.new_empty(v.shape),
            None if sinks is None else torch.zeros_like(sinks),
        )
    dtype = accumulator_dtype(q.dtype)
    saved = call.kernel.save(q, out, lse, dout, dlse)
    home = call.schedule.homecoming(call.trip, (k, v), dtype)
    hops = call.plan.passes
    summed = hops > 1 and saved.sums is None
    dq = QueryGradient(q.new_empty(q.shape), q.new_empty(q.shape, dtype=dtype) if summed else None)
    if not hops:
        dq.final.zero_()
    pair = call.kernel if isinstance(call.kernel, Pairing) and saved.sums is not None else None
    some, own = call.heads_apart(k, pair.enough_keys(k.device)) if pair else 0, None
    for step, hop, (k_held, v_held) in call.visit((k, v)):
        if not step.works:
            home.send(step)
            continue
        parts = call.plan.intervals[step.owner]
        keys = Keys(k_held, v_held, parts[0])
        dkv = KeyGradient(*home.room(step))
        if pair and some and hop.first:
            pair.backward_some(saved, keys, call.scores, range(some), hop, dq, dkv)
            home.send(step)
            own = keys, dkv
        else:
            hop = Hop(hop.first, hop.last and not own)
            keys_done = bind(home.send, step)
            _backward(saved, keys, parts, hop, dq, dkv, keys_done, call)
    if pair and own:
        keys, dkv = own
        others = range(some, k.shape[2])
        pair.backward_some(saved, keys, call.scores, others, Hop(first=False, last=True), dq, dkv)
    dk, dv = home.finish()
    return dq.final, dk, dv, _sinks_gradient(saved, call.scores.sinks)


def _passes(parts: tuple[Intervals, ...], hop: Hop) -> Iterator[tuple[Intervals, Hop]]:
    """The parts of the mask in a step, each with its place among all passes of the call."""
    for n, rows in enumerate(parts):
        yield rows, Hop(first=hop.first and n == 0, last=hop.last and n == len(parts) - 1)


def _of(rows: Intervals, x: Tensor) -> Tensor:
    """The keys of ``x [B, K, ...]`` that ``rows`` are about."""
    return x[:, rows.keys.start : rows.keys.stop]


def _backward(
    saved: Saved, keys: Keys, parts: tuple[Intervals, ...], hop: Hop, dq: QueryGradient, dkv: KeyGradient,
    keys_done: Callable[[], None], call: Call,
) -> None:  # fmt: skip
    """`Kernel.backward` of a step. Parts of the mask after the first are added to its dK and dV, which round once."""
    if len(parts) == 1:
        call.kernel.backward(saved, keys.k, keys.v, keys.rows, call.scores, hop, dq, dkv, keys_done)
        return
    dtype = accumulator_dtype(saved.q.dtype)
    wide = dkv.dk.dtype == dtype
    total = dkv if wide else KeyGradient(*(torch.empty_like(x, dtype=dtype) for x in (dkv.dk, dkv.dv)))
    for rows, place in _passes(parts, hop):
        k, v = _of(rows, keys.k), _of(rows, keys.v)
        first = rows is parts[0]  # about all keys
        part = total if first else KeyGradient(k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype))
        call.kernel.backward(saved, k, v, rows, call.scores, place, dq, part, lambda: None)
        if not first:
            _of(rows, total.dk).add_(part.dk)
            _of(rows, total.dv).add_(part.dv)
    if not wide:
        dkv.dk.copy_(total.dk)
        dkv.dv.copy_(total.dv)
    keys_done()


def _sinks_gradient(saved: Saved, sinks: Tensor | None) -> Tensor | None:
    """A sink has probability ``exp(sink - lse)`` and value 0, so its gradient is ``-sum(probability * delta)``."""
    if sinks is None:
        return None
    # Where nothing was seen and the sink is -inf, lse is too: a probability of 0, not of exp(-inf + inf).
    lse = saved.lse.masked_fill(saved.lse == -torch.inf, 0.0)
    probability = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    return -(probability * saved.delta).sum((0, 2)).to(sinks.dtype)
