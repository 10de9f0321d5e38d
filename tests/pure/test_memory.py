"""The memory formula of `benchmarks/memory.py` against every storage that the engine allocates, with a kernel that
allocates what the Triton kernel does, or the Hopper kernel, and computes nothing."""

from dataclasses import dataclass

import pytest
import torch

import distflash as df
from benchmarks.common import Shape
from benchmarks.memory import predict
from benchmarks.meter import Meter
from distflash import engine
from distflash.kernels.base import Saved, Scores
from distflash.transport import Simulator


@dataclass(frozen=True)
class Hollow:
    """Allocates what the hops of a backward pass share, and nothing in a hop."""

    adds_up: bool

    def not_supported_reasons(self, problem):
        return []

    def forward(self, q, k, v, rows, scores, hop, into):
        pass

    def save(self, q, out, lse, dout, dlse):
        stats = torch.empty(2, *lse.shape)
        if not self.adds_up:
            return Saved(q, dout, lse, stats[1], stats)
        tiles = -(-q.shape[1] // 64)
        sums = torch.empty(q.shape[0] * q.shape[2] * tiles, 64, max(64, q.shape[3]))
        return Saved(q, dout, lse, stats[1], stats, q.new_zeros(2, dtype=torch.int32), sums)

    def backward(self, saved, k, v, rows, scores, hop, dq, dkv, keys_done):
        keys_done()


class Uncounted:
    """A transport whose own work (the simulator's copies) is not this rank's memory."""

    def __init__(self, inner):
        self.inner, self.rank, self.world_size, self.device = inner, inner.rank, inner.world_size, inner.device

    def exchange(self, sends, receives):
        with torch.utils._python_dispatch._disable_current_modes():
            return Quiet(self.inner.exchange(sends, receives))


class Quiet:
    def __init__(self, pending):
        self.pending = pending

    def wait(self):
        with torch.utils._python_dispatch._disable_current_modes():
            self.pending.wait()


def sizes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(transport, shape, mask, layout, adds_up):
    cp = df.ContextParallel(transport, layout=layout)
    plan, T = cp.plan(mask, shape.S), cp.seq_local(shape.S)
    q, dout = (torch.zeros(shape.B, T, shape.H, d, dtype=torch.bfloat16) for d in (shape.D, shape.V))
    k, v = (torch.zeros(shape.B, T, shape.G, d, dtype=torch.bfloat16) for d in (shape.D, shape.V))
    call = engine.Call(plan, cp.schedule, Uncounted(transport), Hollow(adds_up), Scores(1.0))
    with Meter() as meter:
        meter.ignore(q, k, v, dout)
        out, lse = engine.forward(q, k, v, call)
    intervals = 12 * sum(len(i.row_lo) + len(i.col_lo) for parts in plan.intervals.values() for i in parts)
    forward = meter.peak - sizes(out, lse) + intervals
    with Meter() as meter:
        meter.ignore(q, k, v, dout, out, lse)
        dq, dk, dv, _ = engine.backward(dout, None, q, k, v, out, lse, call)
    return (forward, meter.peak - sizes(dq, dk, dv)), predict(shape, plan, transport.rank, 2, adds_up)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", [df.Zigzag(), df.Contiguous()], ids=repr)
@pytest.mark.parametrize("mask", [df.Causal(), df.Window(100, 0)], ids=repr)
@pytest.mark.parametrize("adds_up", [False, True], ids=["written", "added up"])
def test_formula_is_what_the_engine_allocates(ranks, layout, mask, adds_up):
    shape = Shape(1, 1024, 8, 2, 32, 16)
    for measured, predicted in Simulator(ranks).run(lambda t: measure(t, shape, mask, layout, adds_up)):
        assert measured[0] == predicted.forward
        assert measured[1] == pytest.approx(predicted.backward, rel=0.02)
