"""A user's own mask, layout, schedule and kernel are one class each, and work with all others."""

from dataclasses import dataclass, replace

import pytest
import torch

import distflash as df
from distflash.kernels import Kernel
from distflash.kernels.base import BackwardContext
from distflash.partial import Softmax
from distflash.schedules.travel import KeysTravel
from tests.dense import Problem, assert_exact, join, make_inputs, on_rank


@dataclass(frozen=True)
class Dilated(df.Mask):
    """Keys up to the query's own block of ``size``, and the first key of the sequence."""

    size: int

    def parts(self, positions, seq_len):
        start = positions // self.size * self.size
        return (start, positions + 1), (torch.zeros_like(start), start.clamp_max(1))


@dataclass(frozen=True)
class Backwards(df.Layout):
    """One run a rank, the last rank's first."""

    def ranges(self, seq_len, world_size, rank):
        place = world_size - 1 - rank
        return (range(place * seq_len // world_size, (place + 1) * seq_len // world_size),)


@dataclass(frozen=True)
class Upwards(KeysTravel):
    """A ring in the other direction."""

    def sources(self, rank, world_size):
        return tuple(((rank + step) % world_size,) for step in range(world_size))

    def route(self, rank, source, world_size):
        return (rank + 1) % world_size


class Dense(Kernel):
    """The whole matrix of scores, in plain torch, one source at a time."""

    def not_supported_reasons(self, problem):
        return ["it has no ALiBi"] if problem.alibi else []

    def scores(self, q, keys, scores):
        """``[B, H, T, K]``, -inf where masked; and k and v with a head for each query head, ``[B, H, K, D]``."""
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (keys.k, keys.v))
        s = q.transpose(1, 2) @ k.mT * scores.scale
        key = torch.arange(k.shape[2])
        seen = (key >= keys.rows.row_lo[:, None]) & (key < keys.rows.row_hi[:, None])
        return s.masked_fill(~seen, -torch.inf), k, v

    def forward(self, q, keys, each, scores, into):
        if each.first:
            into.fill_identity(scores.sinks)
        s, _, v = self.scores(q, keys[0], scores)
        state = Softmax.of_scores(s, v)
        if into.running is None:
            sink = into.lse, (into.lse > -torch.inf).to(into.lse.dtype), torch.zeros_like(state.weighted)
            out, lse = Softmax(*sink).merge(state).finish()
            into.final.copy_(out.transpose(1, 2))
            into.lse.copy_(lse)
            return
        into.merge((state.maximum, state.total, state.weighted.transpose(1, 2)), self.base)
        if each.last:
            into.finish(self.base)

    def preprocess(self, q, out, lse, dout, dlse):
        delta = (out * dout).sum(-1).transpose(1, 2)
        return BackwardContext(q, dout, lse, delta if dlse is None else delta - dlse)

    def backward(self, saved, keys, each, scores, dq, dkv):
        s, k, v = self.scores(saved.q, keys, scores)
        p = (s - saved.lse.masked_fill(saved.lse == -torch.inf, 0.0)[..., None]).exp()
        dout = saved.dout.transpose(1, 2)
        ds = p * (dout @ v.mT - saved.delta[..., None]) * scores.scale
        for gradient, x in ((dkv.dk, ds.mT @ saved.q.transpose(1, 2)), (dkv.dv, p.mT @ dout)):
            gradient.copy_(x.unflatten(1, (gradient.shape[2], -1)).sum(2).transpose(1, 2))
        part = (ds @ k).transpose(1, 2)
        total = part if each.first else dq.sum + part
        (dq.final if each.last else dq.sum).copy_(total)


@pytest.mark.parametrize("mask", [Dilated(4), df.Causal() & Dilated(7) | df.Window(1, 0)], ids=repr)
@pytest.mark.parametrize("layout", [Backwards(), df.Zigzag()], ids=repr)
@pytest.mark.parametrize("schedule", [Upwards(), df.AllGather(2), df.Ulysses(Upwards())], ids=repr)
@pytest.mark.parametrize("kernel", [Dense(), df.kernels.Reference(3, 4)], ids=lambda kernel: type(kernel).__name__)
def test_exact_with_parts_of_the_users_own(mask, layout, schedule, kernel):
    p = Problem(mask, seq_len=29, heads=8, kv_heads=4, sinks=True)
    x = make_inputs(p)
    parts = df.transport.Simulator(4, shape=(2, 2)).run(
        lambda transport: on_rank(p, x, df.ContextParallel(transport, layout, schedule, kernel))
    )
    assert_exact(p, x, join(parts, layout, p.seq_len))


@dataclass(frozen=True)
class Forgets(df.schedules.Schedule):
    """On one rank the last stage of one direction is missing."""

    direction: str

    def plan(self, geometry, rank):
        plan = df.Ring().plan(geometry, rank)
        stages = [stage for stage in getattr(plan, self.direction) if stage.passes]
        return replace(plan, **{self.direction: tuple(stages[:-1])}) if rank == 1 else plan


@pytest.mark.parametrize(
    "schedule", [Forgets("forward"), Forgets("backward"), df.Ulysses(Forgets("forward"))], ids=repr
)
def test_a_plan_that_forgets_keys_is_refused(schedule):
    """Its result would be silently wrong, or not written at all."""
    p = Problem(df.Causal(), 40, heads=4, kv_heads=2)
    x = make_inputs(p)
    with pytest.raises(
        RuntimeError, match=r"schedule: .*Forgets.*\.plan has rank 1 compute .* pairs .*, but its queries"
    ):
        df.transport.Simulator(6, shape=(3, 2)).run(lambda t: on_rank(p, x, df.ContextParallel(t, schedule=schedule)))
