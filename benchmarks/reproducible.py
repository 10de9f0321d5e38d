"""The cost of `Reproducible`, compared with a ring: kernel calls, bytes received, and CPU time.

    python -m benchmarks.reproducible                          # plain torch on the CPU, ranks simulated in one process
    python -m benchmarks.reproducible --seq-len 131072 --plans-only --heads 32 --kv-heads 8 --head-dim 128

Prints a markdown table, causal, zigzag. Calls and bytes are those of a plan, of the rank that has most. Seconds are CPU
time of all ranks together, so another process on the machine does not count. Fails if the bits of a reproducible call
differ between numbers of ranks. GPU time is not measured here.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

import distflash as df
from benchmarks import common
from benchmarks.common import Shape
from distflash.schedules import Schedule
from distflash.transport import SimulatedTransport, Simulator

MASK = df.Causal()
RING = "ring"
_REPEATS = 3
Results = tuple[Tensor, ...]


def group(transport: SimulatedTransport, chunk: int, schedule: Schedule) -> df.ContextParallel:
    return df.ContextParallel(transport, df.WholeChunks(df.Zigzag(), chunk), schedule)


def costs(shape: Shape, ranks: int, chunk: int, schedule: Schedule, dtype: torch.dtype) -> dict[str, float]:
    """Of the plans: kernel calls, MB received and seconds of planning, of the rank with most."""

    def of_rank(transport: SimulatedTransport) -> dict[str, float]:
        began = time.process_time()
        plan = group(transport, chunk, schedule).plan(MASK, shape.S)
        planning = time.process_time() - began
        heads = shape.H, shape.G, shape.D, shape.V, dtype
        return {
            "calls": len(plan.passes),
            "calls backward": len(plan.backward_passes),
            "MB": plan.bytes(*heads) / 1e6,
            "MB backward": plan.bytes(*heads, backward=True) / 1e6,
            "planning": planning,
        }

    found = Simulator(ranks).run(of_rank)
    return {name: max(row[name] for row in found) for name in found[0]}


def timed(inputs: Results, ranks: int, chunk: int, schedule: Schedule) -> tuple[dict[str, float], Results]:
    """CPU seconds of a forward and of a backward, all ranks together, and out, dq, dk and dv of the whole sequence."""
    seq_len = inputs[0].shape[1]

    def work(transport: SimulatedTransport) -> tuple[list[float], Results]:
        cp = group(transport, chunk, schedule)
        q, k, v, dout = (cp.shard(x) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        marks = []
        for _ in range(_REPEATS + 1):  # the first makes the plan
            transport.gather_ints([])
            marks.append(time.process_time())
            out = df.attention(*leaves, mask=MASK, cp=cp, seq_len=seq_len)
            transport.gather_ints([])
            marks.append(time.process_time())
            gradients = torch.autograd.grad(out, leaves, dout)
        transport.gather_ints([])
        marks.append(time.process_time())
        return marks, (out.detach(), *gradients)

    parts = Simulator(ranks).run(work)
    marks = parts[0][0]
    steps = [after - before for before, after in pairwise(marks)]
    seconds = {"forward": median(steps[2::2]), "backward": median(steps[3::2])}
    layout = df.WholeChunks(df.Zigzag(), chunk)
    order = torch.cat([layout.positions(seq_len, ranks, rank) for rank in range(ranks)]).argsort()
    return seconds, tuple(torch.cat([found[n] for _, found in parts], 1)[:, order] for n in range(4))


def measure(options: argparse.Namespace, shape: Shape) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Rows by schedule and ranks, and where bits differ."""
    dtype = getattr(torch, options.dtype)
    rows: dict[str, dict[str, Any]] = {}
    different = []
    inputs = tuple(x.detach() for x in common.random_inputs(shape, shape.S, dtype, torch.device("cpu")))
    for chunk in (None, *options.chunks):
        schedule = df.Ring() if chunk is None else df.Reproducible(chunk)
        first: Results = ()
        for ranks in options.ranks:
            name = f"{RING if chunk is None else f'reproducible, chunk {chunk}'} | {ranks}"
            dealt = chunk or min(options.chunks)
            rows[name] = costs(shape, ranks, dealt, schedule, dtype)
            if not options.plans_only:
                seconds, got = timed(inputs, ranks, dealt, schedule)
                rows[name] |= seconds
                first = first or got
                if chunk and not all(map(torch.equal, got, first)):
                    different.append(name)
    return rows, different


def table(rows: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(rows.values())))
    lines = ["| schedule | ranks | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for name, row in rows.items():
        numbers = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=2048)
    common.add_sizes(parser)
    parser.set_defaults(heads=4, kv_heads=2, head_dim=64, dtype="float32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--chunks", type=int, nargs="+", default=[128])
    parser.add_argument("--plans-only", action="store_true", help="count, and compute nothing")
    options = parser.parse_args()
    shape = common.shape_of(options, options.seq_len)
    rows, different = measure(options, shape)
    print(f"\n{shape}, {options.dtype}, causal, zigzag, plain torch on CPU\n\n{table(rows)}\n")
    common.save("reproducible-cpu", options.out, {"shape": str(shape), "rows": rows, "different": different})
    print(
        "\n".join(f"other bits than on {options.ranks[0]} rank(s): {name}" for name in different) or "bits are the same"
    )
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
