"""Shared by all benchmarks: timing, FLOP counts, and records.

Every figure is a median. Every record has the hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import distflash as df
from benchmarks import pictures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Packages that results are compared with, whose versions stand in the record where they are installed.
PEERS = ("flash-attn-4", "flash-attn", "ring-flash-attn")
# A call that takes longer than this is timed once: clocks have settled, and launch noise is nothing to it.
_LONG_SECONDS = 2.0
_ROUNDS = 3
# How long the device waits before a call, in which the host gets ahead: half as long again as the host needed the last
# time, within these bounds. The counter runs at about 2 GHz.
_LEAST_AHEAD, _MOST_AHEAD = 1e-3, 10e-3
CYCLES_PER_SECOND = 2e9


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the PNG")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time a call, about")
    return parser


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that a benchmark of one attention layer has: see `shape_of`."""
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--value-head-dim", type=int, help="where values have another: 128 beside 192, say")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


def shape_of(options: argparse.Namespace, seq_len: int) -> Shape:
    values = options.value_head_dim or options.head_dim
    return Shape(1, seq_len, options.heads, options.kv_heads, options.head_dim, values)


def start(device: str, timed: bool = True) -> torch.device:
    """Join the ranks that torchrun started, if any. Returns this rank's device.

    Raises:
        ValueError: there is no GPU; or there are more ranks than GPUs, and the benchmark is ``timed``.
    """
    local, ranks = (int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count()
    if device == "cuda" and ranks > gpus and (timed or gpus == 0):
        raise ValueError(
            f"--nproc-per-node: got {ranks}, expected at most {gpus}, a GPU for each rank; start fewer ranks, or pass "
            "--device cpu"
        )
    here = take_gpu(local, ranks) if device == "cuda" else torch.device("cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", device_id=here if is_gpu(here) else None)
    return here


def take_gpu(rank: int, ranks: int) -> torch.device:
    """GPU n for rank n of the ``ranks`` on this host, modulo the number of GPUs.

    NCCL does not allow two ranks of one host on one GPU, so it is told that they are on two hosts.
    """
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        os.environ["NCCL_HOSTID"] = f"{platform.node()}, {rank // gpus}"
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    return device


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads let go of the last tensors, for which they need Python: one that exits would abort the process.
        time.sleep(0.1)


def ring() -> df.transport.Transport:
    """All ranks of the job, or this process alone."""
    return df.transport.Distributed(dist.group.WORLD) if dist.is_initialized() else df.transport.Alone()


# ---------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Seconds of one call on the device. host: CPU seconds to enqueue it."""

    seconds: float
    fastest: float
    slowest: float
    host: float
    repeats: int


class Clock:
    """Times calls in turns, so that a GPU that gets warm affects all alike.

    Args:
        device: where the calls run.
        seconds: approximate duration of the measurement of each call.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self._token = torch.zeros(1, device=device)
        # Larger than any L2 cache: what a call reads comes from memory, as in a model.
        self._flush = torch.empty(2**28 if is_gpu(device) else 0, dtype=torch.int8, device=device)

    def medians(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """Time each call; all have run before (compiled, connected, checked). All ranks must time the same calls."""
        samples = {name: self._samples(call, 1) for name, call in calls.items()}
        # One guess for all ranks, so that they repeat equally often.
        guess = {name: worst(over_ranks(taken[0][0], self.device)) for name, taken in samples.items()}
        repeats = {n: min(20, max(1, round(self.seconds / _ROUNDS / max(s, 1e-6)))) for n, s in guess.items()}
        for turn in range(_ROUNDS):
            for name, call in calls.items():
                if guess[name] < _LONG_SECONDS:
                    taken = self._samples(call, repeats[name])
                    samples[name] = taken if turn == 0 else samples[name] + taken  # the guess is not a sample
        return {name: _timing(taken) for name, taken in samples.items()}

    def _samples(self, call: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
        return (self._on_gpu if is_gpu(self.device) else _on_cpu)(call, repeats)

    def _on_gpu(self, call: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        hosts = [_MOST_AHEAD]
        torch.cuda.synchronize()
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            ahead = min(_MOST_AHEAD, max(_LEAST_AHEAD, 1.5 * hosts[-1]))
            torch.cuda._sleep(int(ahead * CYCLES_PER_SECOND))  # the host gets ahead: the device's time is measured
            if dist.is_initialized():
                dist.all_reduce(self._token)  # on the device: all ranks begin together
            begin.record()
            before = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - before)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [(b.elapsed_time(e) / 1e3, h) for (b, e), h in zip(events, hosts[1:], strict=True)]


def _on_cpu(call: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
    samples = []
    for _ in range(repeats):
        before = time.perf_counter()
        call()
        samples.append((time.perf_counter() - before,) * 2)
    return samples


def _timing(samples: Sequence[tuple[float, float]]) -> Timing:
    seconds = [s for s, _ in samples]
    return Timing(median(seconds), min(seconds), max(seconds), median(h for _, h in samples), len(samples))


def over_ranks(value: float, device: torch.device) -> list[float]:
    """Every rank's value."""
    if not dist.is_initialized():
        return [value]
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [x.item() for x in every]


def worst(values: Sequence[float]) -> float:
    """The largest value; NaN if any is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


# -------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Shape:
    """B batch, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head dim of v."""

    B: int
    S: int
    H: int
    G: int
    D: int
    V: int

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.G else f"H{self.H}/{self.G}"
        return f"B{self.B} S{self.S} {heads} D{self.D}" + ("" if self.D == self.V else f"/{self.V}")


def flops(shape: Shape, pairs: int) -> dict[str, float]:
    """Floating-point operations of ``pairs`` allowed (query, key) pairs; masked ones are not counted.

    Forward: q.k and p.v. Backward: q.k again, dout.v, and the products for dV, dQ and dK: 2.5 times forward if D = V.
    """
    each = 2 * shape.B * shape.H * pairs
    return {"forward": each * (shape.D + shape.V), "backward": each * (3 * shape.D + 2 * shape.V)}


def pairs_of(mask: df.Mask, seq_len: int) -> int:
    """The exact number of allowed (query, key) pairs."""
    return int(df.ContextParallel(df.transport.Alone()).plan(mask, seq_len).pairs.sum())


def random_inputs(shape: Shape, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Normal ``q, k, v`` that require gradients, and ``dout``, of ``length`` local tokens, seeded by rank."""
    generator = torch.Generator(device).manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    dims = ((shape.H, shape.D), (shape.G, shape.D), (shape.G, shape.V), (shape.H, shape.V))
    q, k, v, dout = (
        torch.randn(shape.B, length, *dim, generator=generator, device=device, dtype=dtype) for dim in dims
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


# --------------------------------------------------------------------------------------------------------- records


def environment() -> dict[str, Any]:
    """Hardware, versions, code and command."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    gpus = [torch.cuda.get_device_name(n) for n in range(min(ranks, torch.cuda.device_count()))]
    return {
        "gpus": gpus,
        "cpu": _cpu_name(),
        "ranks": ranks,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "peers": installed(*PEERS),
        "distflash": df.__version__,
        "commit": _commit(),
        "sources": _sources(),
        "command": _command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(name: str, out: Path, record: dict[str, Any], draw: pictures.Draw | None = None) -> None:
    """Write ``<name>.json``, and ``<name>.png`` if ``draw`` is given, on rank 0.

    A long run saves its record after each row, and the picture after the last. draw: plots the record on a figure.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), **record}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if draw is not None:
        pictures.save(record, draw, out / f"{name}.png")
        say(f"wrote {out / name}.json and .png")


def say(message: str) -> None:
    """Print on the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def installed(*packages: str) -> dict[str, str]:
    """The versions of installed packages."""
    return {name: found for name in packages if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, followed by ``+`` if the working tree differs; None outside git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    # Results themselves do not make a difference.
    changed = git("status", "--porcelain", "--", "distflash", "benchmarks/*.py")
    return commit and commit + ("+" if changed else "")


def _sources() -> str:
    """A digest of the package's files, to identify the code without git."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "distflash").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _command() -> str:
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    ranks = dist.get_world_size() if dist.is_initialized() else 0
    launcher = f"torchrun --standalone --nproc-per-node {ranks}" if ranks else "python"
    return shlex.join([*launcher.split(), "-m", module, *sys.argv[1:]])
