"""Host time of a chunk or a decoding step over a long cache: `python -m benchmarks.plan_host`.

Measured are a chunk's ledger, checks and plan, and a step's horizon and checks, without a device. Each row has the
median and the maximum over repetitions, each with a new ledger. One thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import distflash as df
from benchmarks import common
from distflash.chunks import Chunk
from distflash.exact import ByValue
from distflash.horizon import Horizon
from distflash.kernels import Problem, Reference
from distflash.ledger import Ledger

MASKS = {
    "causal": df.Causal(),
    "window 4096": df.Window(4095),
    "window 4096 and 4 first": df.Causal() & (df.Window(4095) | df.FirstTokens(4)),
}
LAYOUTS: list[df.Layout] = [df.Zigzag(), df.Striped()]


def ledger_of(layout: df.Layout, world_size: int, keys: int, chunk: int) -> Ledger:
    """Of a prompt that came in chunks."""
    ledger = Ledger.empty(world_size)
    for start in range(0, keys, chunk):
        ledger = ledger.with_chunk(layout, min(chunk, keys - start))
    return ledger


def milliseconds(work: Callable[[], object], repetitions: int) -> list[float]:
    """Of each call but the first three."""
    times = []
    for _ in range(repetitions + 3):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return times[3:]


def plan_time(
    layout: df.Layout, world_size: int, mask: df.Mask, keys: int, tokens: int, repetitions: int
) -> list[float]:
    """A chunk of ``tokens`` after so many keys."""
    problem = Problem(torch.device("cpu"), torch.bfloat16, 32, 8, 128, 128, 0.0, False, False, 0.0)
    whole, of_mask, kernel = ledger_of(layout, world_size, keys, 32768), ByValue(mask), Reference()

    def work() -> None:
        before = Ledger(whole.held, whole.total)
        chunk = Chunk(of_mask, before, before.with_chunk(layout, tokens), layout, problem)
        assert chunk.refusal() is None
        chunk.plan(df.Ring(), kernel, world_size - 1, intra_node=True)

    return milliseconds(work, repetitions)


def step_time(mask: df.Mask, keys: int, repetitions: int) -> list[float]:
    """What a step asks of a horizon that there is."""
    horizon = Horizon.of(mask, 0, keys + 64, torch.device("cpu"))
    return milliseconds(lambda: (horizon.covers(keys, keys + 1), horizon.refusal((keys,), 1)), repetitions)


def measure(options: Any) -> dict[str, Any]:
    rows = []
    for world_size in options.world_sizes:
        for layout in LAYOUTS:
            for name, mask in MASKS.items():
                times = plan_time(layout, world_size, mask, options.keys, options.tokens, options.repetitions)
                rows.append({"what": f"plan, {world_size} ranks, {layout!r}, {name}"} | summary(times))
    for name, mask in MASKS.items():
        rows.append({"what": f"checks of a step, {name}"} | summary(step_time(mask, options.keys, options.repetitions)))
    return {"keys": options.keys, "tokens": options.tokens, "milliseconds": rows}


def summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "largest": max(times)}


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=2**20)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repetitions", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(options)
    common.say(f"{options.tokens} queries over {options.keys} keys before them, ms (median, largest)")
    for row in record["milliseconds"]:
        common.say(f"  {row['what']:66} {row['median']:8.3f} {row['largest']:8.3f}")
    common.save("plan-host", options.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
