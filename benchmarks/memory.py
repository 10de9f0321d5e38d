"""How much memory does attention over a ring take beyond its inputs and results, and is it what the formula says?

    torchrun --standalone --nproc-per-node 2 -m benchmarks.memory
    python -m benchmarks.memory                                          # one GPU, no ring
    torchrun --standalone --nproc-per-node 8 -m benchmarks.memory        # 8 ranks, on one GPU too, if that has room

Peak bytes of forward beyond q, k, v, out and lse, and of backward beyond those, dout, dq, dk and dv, on each rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import distflash as df
from benchmarks import common
from benchmarks.common import Shape
from benchmarks.contest import kernel_of
from distflash.engine import Plan
from distflash.kernels.hopper.tiles import QUERIES

FP32 = 4
COUNTER = 2 * 4  # int32 [2], of a kernel whose programs share out their work as they go


@dataclass(frozen=True)
class Extra:
    """Bytes beyond inputs and results at the peak of each pass."""

    forward: int
    backward: int


def predict(shape: Shape, plan: Plan, rank: int, itemsize: int, adds_up: bool) -> Extra:
    """The formula; ``adds_up`` if the kernel adds up dQ in memory (the Hopper kernel), in sums of its own.

    With B batch, T this rank's tokens, L the longest rank's, H and G query and key heads, D and V head dims,

        row     = B T H                                one number per query and head
        keys(n) = B n G (D + V)                        one number per element of n tokens' K and V

    forward  = 4 row (V + 2)    fp32 running softmax, if there is more than one hop to merge
             + R keys(L) size   R receive buffers of K and V: 1 for one arrival, 2 (in turns) for more
             + intervals        24 (T + K) / 2 bytes for every owner worked on: kept for all layers and steps
             + 8                a counter
    backward = 8 row            lse in base 2, and delta = rowsum(dout out)
             + 4 row D          fp32 sum of dQ, if there is more than one hop; always, if the kernel adds up in memory,
                                of T and D up to a multiple of 64
             + 8                a counter, if it does
             + 2 * 4 keys(T)    fp32 dK and dV of the own keys, and one part arriving, if any other rank works on them
             + A 4 keys(L)      A parts of dK and dV on their way out: 1 for one other owner, 2 (in turns) for more
             + the larger of    R keys(L) size - keys(T) size    in the last hop, before the rounded dK and dV are there
                           and  min(R, 1) keys(L) size           at the end

    For a causal zigzag ring of W > 2 equal ranks R = A = 2, and with 2-byte elements this is, per rank,
    forward 4 B T H V + 4 B T G (D + V), backward about 4 B T H D + 18 B T G (D + V): nothing grows with W at given T.
    """
    T, L = plan.lengths[rank], max(plan.lengths)
    row, keys = shape.B * T * shape.H, shape.B * shape.G * (shape.D + shape.V)
    received = min(2, sum(step.source is not None for step in plan.steps))
    away = min(2, sum(step.works and step.owner != rank for step in plan.steps))
    shared = any(step.home_from is not None for step in plan.steps)
    merged = len(plan.working) > 1
    intervals = sum(3 * FP32 * (T + plan.lengths[owner]) for owner in plan.intervals)
    arriving = received * keys * L * itemsize
    # Where nobody else works on the own keys their gradients are written as they are, without a sum.
    pending = keys * T * itemsize if shared else 0
    return Extra(
        forward=merged * FP32 * row * (shape.V + 2) + arriving + intervals + COUNTER,
        backward=2 * FP32 * row
        + (_sums(shape, T) + COUNTER if adds_up else merged * FP32 * row * shape.D)
        + 2 * shared * FP32 * keys * T
        + away * FP32 * keys * L
        + max(arriving - pending, min(received, 1) * keys * L * itemsize),
    )


def _sums(shape: Shape, length: int) -> int:
    """Bytes of the Hopper kernel's sums of dQ."""
    return FP32 * shape.B * shape.H * -(-length // QUERIES) * QUERIES * -(-shape.D // 64) * 64


def _peak(work: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Peak bytes during ``work`` beyond what was there before and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = work()
    torch.cuda.synchronize()
    returned = sum(t.numel() * t.element_size() for t in results)
    return torch.cuda.max_memory_allocated() - before - returned, results


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Extra, Extra]:
    """(predicted, measured) on this rank."""
    cp = df.ContextParallel(common.ring(), layout=df.Zigzag(), schedule=df.Ring())  # new: no intervals kept yet
    mask, length = df.Causal(), cp.seq_local(shape.S)
    q, k, v, dout = common.random_inputs(shape, length, dtype, device)
    forward, (out, lse) = _peak(lambda: df.attention(q, k, v, mask=mask, cp=cp, seq_len=shape.S, return_lse=True))
    backward, _grads = _peak(lambda: torch.autograd.grad(out, (q, k, v), dout))
    adds_up = kernel_of(cp, (q, k, v), shape.S).save(q, out, lse, dout, None).sums is not None
    predicted = predict(shape, cp.plan(mask, shape.S, q.device), cp.rank, q.element_size(), adds_up)
    return predicted, Extra(forward, backward)


def row_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    predicted, measured = measure(shape, device, dtype)
    row: dict[str, Any] = {"shape": str(shape), "seq_len": shape.S}
    for direction in ("forward", "backward"):
        p, m = (common.over_ranks(getattr(x, direction), device) for x in (predicted, measured))
        row[direction] = {
            "predicted": p,
            "measured": m,
            "ratio": [a / b if b else None for a, b in zip(p, m, strict=True)],
        }
    return row


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']}")
    for direction in ("forward", "backward"):
        p, m, ratio = (row[direction][key][0] for key in ("predicted", "measured", "ratio"))
        share = f"{ratio:.3f}" if ratio else "-"
        common.say(f"  {direction:8}  predicted {p / 2**20:9.1f} MiB   measured {m / 2**20:9.1f} MiB   ratio {share}")


def draw(figure: Any, rows: list[dict[str, Any]], ranks: int) -> None:
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    lengths = [row["seq_len"] for row in rows]
    for n, direction in enumerate(("forward", "backward")):
        for kind, style in (("measured", "o"), ("predicted", "-")):
            values = [max(row[direction][kind]) / 2**30 for row in rows]
            axes.plot(lengths, values, style, color=f"C{n}", label=f"{direction}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    title = f"Peak memory beyond inputs and results, {ranks} ranks, causal zigzag"
    common.plain_axes(axes, title, "GiB per rank", "global tokens S")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[16384, 65536, 131072, 262144])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    if options.device == "cpu":
        print("torch counts memory on GPUs only; tests/pure/test_memory.py checks the formula without one")
        return 1
    device = common.start(options.device, timed=False)
    ranks = common.ring().world_size

    def shape(seq_len: int) -> Shape:
        return Shape(1, seq_len, options.heads, options.kv_heads, options.head_dim, options.head_dim)

    measure(shape(2048), device, torch.bfloat16)  # compiles, connects
    rows = []
    for seq_len in options.seq_lens:
        rows.append(row_of(shape(seq_len), device, torch.bfloat16))
        report(rows[-1])
    common.save(f"memory-{ranks}", options.out, {"ranks": ranks, "rows": rows}, lambda f: draw(f, rows, ranks))
    ratios = [r for row in rows for d in ("forward", "backward") for r in row[d]["ratio"] if r]
    worst = max((abs(r - 1) for r in ratios), default=0.0)
    common.say(f"formula within {worst:.1%} of what was measured")
    common.finish()
    # Alone there is next to nothing to measure: the caching allocator's granularity decides.
    return int(worst > 0.1 and ranks > 1)


if __name__ == "__main__":
    sys.exit(main())
