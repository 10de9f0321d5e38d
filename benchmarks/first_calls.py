"""How long does the first call of a configuration take, with triton's disk cache empty and filled?

    python -m benchmarks.first_calls                    # one rank
    python -m benchmarks.first_calls --ranks 2
    python -m benchmarks.first_calls --cases default --ranks 2

Each figure is of new processes: from `ContextParallel.warm_up` until the backward of the first call has finished on the
slowest rank. Before that, torch is imported, and the GPU and the connections between ranks have been used. ``cold``
starts with an empty cache; ``warm`` uses it afterwards. ``alone`` is a cold start without `warm_up`: each kernel is
compiled at its first launch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

import distflash as df
from benchmarks import common

_LONGEST = 200.0  # seconds of one start
_RESULT = "first call: "


@dataclass(frozen=True)
class Case:
    """A configuration: causal, 32 query heads on 8 key heads."""

    head_dim: int = 128
    dtype: str = "bfloat16"
    seq_len: int = 8192


CASES = {"default": Case(), "float32": Case(dtype="float32", seq_len=2048), "wide": Case(head_dim=256)}


def first_call(case: Case, alone: bool) -> dict[str, float]:
    """Seconds of the first call and of the second one, on the slowest rank. In a process that has made no call yet."""
    device = common.start("cuda")
    cp = df.ContextParallel(common.ring())
    shape = common.Shape(1, case.seq_len, 32, 8, case.head_dim, case.head_dim)
    q, k, v, dout = common.random_inputs(shape, cp.seq_local(case.seq_len), getattr(torch, case.dtype), device)
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)

    def seconds(warm_up: bool) -> float:
        torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        if warm_up:
            cp.warm_up(tuple(q.shape), tuple(k.shape), dtype=q.dtype, mask=df.Causal(), seq_len=case.seq_len)
        out = df.attention(q, k, v, mask=df.Causal(), cp=cp, seq_len=case.seq_len)
        torch.autograd.grad(out, (q, k, v), dout)
        torch.cuda.synchronize()
        return common.worst(common.over_ranks(time.perf_counter() - began, device))

    common.over_ranks(0.0, device)
    return {"first": seconds(warm_up=not alone), "second": seconds(warm_up=False)}


def started(name: str, ranks: int, cache: str, alone: bool) -> dict[str, Any]:
    """`first_call` in new processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.first_calls", "--start", name] + ["--alone"] * alone
    path = f"{common.ROOT}:{os.environ.get('PYTHONPATH', '')}"
    variables = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, cwd=common.ROOT, env=variables, capture_output=True, text=True, timeout=_LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {_LONGEST:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    error_line = [line for line in done.stderr.splitlines() if "compil" in line]
    if done.returncode or not lines:
        return {"failed": "\n".join(done.stderr.splitlines()[-8:]), "error_line": error_line}
    return {**json.loads(lines[0].removeprefix(_RESULT)), "error_line": error_line}


def row(name: str, ranks: int) -> dict[str, Any]:
    """Cold, warm, and cold with nothing compiled beforehand."""
    times = {}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        times["cold"] = started(name, ranks, cache, alone=False)
        times["warm"] = started(name, ranks, cache, alone=False)
        times["alone"] = started(name, ranks, other, alone=True)
    return {"case": name, **asdict(CASES[name]), "ranks": ranks, "times": times}


def report(found: dict[str, Any]) -> None:
    common.say(f"{found['case']}, D{found['head_dim']} {found['dtype']}, {found['ranks']} ranks")
    for how, times in found["times"].items():
        result = times.get("failed") or f"{times['first']:.2f} s, the second call {times['second']:.4f} s"
        common.say(f"  {how:6} {result}")
        for line in times.get("error_line", [])[:2]:
            common.say(f"         {line[:160]}")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--start", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        times = first_call(CASES[options.start], options.alone)
        common.say(_RESULT + json.dumps(times))
        common.finish()
        return 0
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        rows.append(row(name, options.ranks))
        report(rows[-1])
        common.save(f"first-calls-{options.ranks}", options.out, {"rows": rows})
    return int(any("failed" in times for found in rows for times in found["times"].values()))


if __name__ == "__main__":
    sys.exit(main())
