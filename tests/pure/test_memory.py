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
from distflash.kernels.base import Abilities, BackwardContext, Kernel, Scores
from distflash.overlap import overlap
from distflash.transport import Simulator


@dataclass(frozen=True)
class Hollow(Kernel):
    """Allocates what the passes of a backward share, and nothing in a pass."""

    adds_up: bool

    def not_supported_reasons(self, problem):
        return []

    def abilities(self, device):
        return Abilities(two_sources=True, some_heads=True) if self.adds_up else Abilities(separate_gradients=True)

    def forward(self, q, keys, each, scores, into):
        pass

    def preprocess(self, q, out, lse, dout, dlse):
        stats = torch.empty(2, *lse.shape)
        if not self.adds_up:
            return BackwardContext(q, dout, lse, stats[1], stats)
        tiles = -(-q.shape[1] // 64)
        sums = torch.empty(q.shape[0] * q.shape[2] * tiles, 64, max(64, q.shape[3]))
        return BackwardContext(q, dout, lse, stats[1], stats, q.new_zeros(2, dtype=torch.int32), sums)

    def backward(self, saved, keys, each, scores, dq, dkv):
        pass


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


ZIGZAG, RING = df.Zigzag(), df.Ring()


def measure(transport, shape, mask, adds_up, layout=ZIGZAG, schedule=RING):
    cp, kernel = df.ContextParallel(transport, layout=layout, schedule=schedule), Hollow(adds_up)
    T = cp.seq_local(shape.S)
    plan = overlap(cp.plan(mask, shape.S), shape.G, shape.B, kernel.abilities(torch.device("cpu")), intra_node=True)
    q, dout = (torch.zeros(shape.B, T, shape.H, d, dtype=torch.bfloat16) for d in (shape.D, shape.V))
    k, v = (torch.zeros(shape.B, T, shape.G, d, dtype=torch.bfloat16) for d in (shape.D, shape.V))
    call = engine.Call(plan, Uncounted(transport), kernel, Scores(1.0))
    with Meter() as meter:
        meter.ignore(q, k, v, dout)
        out, lse, _ = engine.forward(q, k, v, call)
    rows = {id(rows): rows for stage in plan.forward for each in stage.passes for rows in each.visible}
    intervals = 12 * sum(len(i.row_lo) + len(i.col_lo) for i in rows.values())
    forward = meter.peak - sizes(out, lse) + intervals
    with Meter() as meter:
        meter.ignore(q, k, v, dout, out, lse)
        dq, dk, dv, _ = engine.backward(dout, None, q, k, v, out, lse, call)
    return (forward, meter.peak - sizes(dq, dk, dv)), predict(shape, plan, 2, adds_up)


def check(ranks, *args, **kwargs):
    for measured, predicted in Simulator(ranks).run(lambda t: measure(t, *args, **kwargs)):
        assert measured[0] == predicted.forward
        assert measured[1] == pytest.approx(predicted.backward, rel=0.02)


SHAPE = Shape(1, 1024, 8, 2, 32, 16)
UNION = df.Causal() & (df.Window(100, 0) | df.FirstTokens(300))
MASKS = [df.Causal(), df.Full(), df.Window(100, 0), UNION]


@pytest.mark.covering(2, ranks=[1, 2, 3, 8], layout=[df.Zigzag(), df.Contiguous()], mask=MASKS, adds_up=[False, True])
def test_formula_is_what_the_engine_allocates(ranks, layout, mask, adds_up):
    check(ranks, SHAPE, mask, adds_up, layout)


@pytest.mark.parametrize("chunks", [1, 2, 7])
@pytest.mark.parametrize("mask", MASKS, ids=["causal", "full", "window", "union"])
def test_of_an_all_gather(chunks, mask):
    check(8, SHAPE, mask, False, schedule=df.AllGather(chunks))


@pytest.mark.parametrize("mask", MASKS, ids=["causal", "full", "window", "union"])
def test_parts_of_a_batch_are_sent_as_copies(mask):
    check(3, Shape(2, 384, 8, 2, 32, 16), mask, False)


def test_nothing_grows_with_the_number_of_ranks():
    """At as many tokens a rank."""

    def worst(ranks):
        results = Simulator(ranks).run(lambda t: measure(t, Shape(1, 64 * ranks, 8, 2, 32, 16), df.Full(), False)[0])
        return max(backward for _, backward in results)

    assert worst(3) <= worst(4) == worst(8) == worst(16)
