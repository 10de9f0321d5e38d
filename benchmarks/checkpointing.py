"""What does keeping attention's outputs save with activation checkpointing? Time and memory of a step, three ways.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpointing
    python -m benchmarks.checkpointing                                    # one GPU
    python -m benchmarks.checkpointing --device cpu

A step is the forward and backward of the main job's decoder. Compared with full recomputation, it should save one
forward of attention per layer (timed alone in the same run), and keep one more ``out`` and ``lse`` per layer.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import distflash as df
from benchmarks import common, pictures
from benchmarks.common import Shape
from benchmarks.comparison import kernel_of
from benchmarks.meter import Meter
from distflash.kernels.base import Abilities, BackwardContext, Kernel, Problem
from distflash.recipes.config import ModelConfig
from distflash.recipes.model import VOCABULARY, Decoder, loss_sum

NONE, ALL, KEPT = "nothing recomputed", "all recomputed", "attention kept"
WAYS: dict[str, dict[str, bool]] = {
    NONE: {},
    ALL: {"checkpoint_activations": True, "recompute_attention": True},
    KEPT: {"checkpoint_activations": True},
}
ATTENTION = "attention forward"
SEQ_LENS = {"cuda": (16384, 65536), "cpu": (512, 1024)}


class Counted(Kernel):
    """A kernel that counts its forward calls."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.forwards = kernel, 0
        self.base = kernel.base  # type: ignore[misc]  # a class's constant, but of the other's class

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return self.kernel.not_supported_reasons(problem)

    def abilities(self, device: torch.device) -> Abilities:
        return self.kernel.abilities(device)

    def forward(self, *arguments: Any, **keywords: Any) -> None:
        self.forwards += 1
        self.kernel.forward(*arguments, **keywords)

    def preprocess(self, *arguments: Any, **keywords: Any) -> BackwardContext:
        return self.kernel.preprocess(*arguments, **keywords)

    def backward(self, *arguments: Any, **keywords: Any) -> None:
        self.kernel.backward(*arguments, **keywords)


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the weights: what a forward keeps for its backward, and the peak of the step."""

    kept: int
    peak: int


class Bench:
    """One length over all ranks: a decoder whose options change, and its batch."""

    def __init__(self, options: Any, seq_len: int, device: torch.device) -> None:
        self.options, self.seq_len, self.device = options, seq_len, device
        self.shape = Shape(1, seq_len, options.heads, options.kv_heads, options.head_dim, options.head_dim)
        self.dtype = torch.bfloat16 if common.is_gpu(device) else torch.float32
        cp = df.ContextParallel(common.ring(), layout=df.Zigzag(), schedule=df.Ring())
        inputs = common.random_inputs(self.shape, cp.seq_local(seq_len), self.dtype, device)
        self.kernel = Counted(kernel_of(cp, inputs))
        self.cp = df.ContextParallel(cp.transport, layout=cp.layout, schedule=cp.schedule, kernel=self.kernel)
        self.qkv = tuple(t.detach() for t in inputs[:3])
        self.positions = self.cp.positions(seq_len)
        torch.manual_seed(0)
        self.tokens = torch.randint(0, VOCABULARY, (1, seq_len + 1))
        self.model = Decoder(self.config(NONE), self.cp).to(device)

    def config(self, way: str) -> ModelConfig:
        o = self.options
        return ModelConfig(o.layers, o.heads * o.head_dim, o.heads, o.kv_heads, **WAYS[way])

    def forward(self, way: str) -> Tensor:
        self.model.config = self.config(way)
        tokens, labels = (self.tokens[:, self.positions.cpu() + n].to(self.device) for n in (0, 1))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(tokens, self.seq_len)
        return self.cp.mean(loss_sum(logits, labels), labels.numel(), reduction="sum")

    def step(self, way: str) -> None:
        self.model.zero_grad()
        self.forward(way).backward()

    def attention(self) -> None:
        with torch.no_grad():
            df.attention(*self.qkv, mask=df.Causal(), cp=self.cp, seq_len=self.seq_len)

    def gradients(self, way: str) -> tuple[Tensor, float]:
        """The flat gradients of a step, and the number of attention forwards per layer."""
        self.kernel.forwards = 0
        self.step(way)
        passes = len(self.cp.plan(df.Causal(), self.seq_len, self.device).passes)
        flat = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        return flat, self.kernel.forwards / self.options.layers / passes

    def memory(self, way: str) -> Memory:
        """The memory of a step that accumulates into existing gradients."""
        meter = Meter() if not common.is_gpu(self.device) else None
        before = self._bytes(meter)
        if meter is None:
            torch.cuda.reset_peak_memory_stats()
        within: AbstractContextManager[object] = nullcontext() if meter is None else meter
        with within:
            loss = self.forward(way)
            kept = self._bytes(meter) - before
            loss.backward()
        peak = torch.cuda.max_memory_allocated() if meter is None else meter.peak
        return Memory(kept, peak - before)

    def _bytes(self, meter: Meter | None) -> int:
        if meter is not None:
            return meter.live
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def predicted_bytes(self) -> int:
        """Bytes of out and lse of all layers."""
        s, T, size = self.shape, len(self.positions), self.dtype.itemsize
        return self.options.layers * s.B * s.H * T * (s.V * size + 4)


def row_of(bench: Bench, seconds: float) -> dict[str, Any]:
    """Counts and gradients first; then time, then memory."""
    expected, _ = bench.gradients(NONE)
    forwards, errors = {}, {}
    for way in WAYS:
        flat, forwards[way] = bench.gradients(way)
        errors[way] = common.worst(common.over_ranks(((flat - expected).norm() / expected.norm()).item(), bench.device))
        del flat
    del expected
    calls = {ATTENTION: bench.attention, **{way: lambda way=way: bench.step(way) for way in WAYS}}
    timings = common.Clock(bench.device, seconds).medians(calls)
    times = {name: common.over_ranks(timing.seconds, bench.device) for name, timing in timings.items()}
    slowest = {name: common.worst(each) for name, each in times.items()}
    memory = {way: bench.memory(way) for way in WAYS}
    return {
        "shape": str(bench.shape),
        "seq_len": bench.seq_len,
        "kernel": repr(bench.kernel.kernel),
        "attention forwards": forwards,
        "gradients differ": errors,
        "seconds": times,
        "share saved": {
            "predicted": bench.options.layers * slowest[ATTENTION] / slowest[ALL],
            "seen": 1 - slowest[KEPT] / slowest[ALL],
        },
        "kept bytes": {way: m.kept for way, m in memory.items()},
        "peak bytes": {way: m.peak for way, m in memory.items()},
        "bytes of out and lse": {"predicted": bench.predicted_bytes(), "seen": memory[KEPT].kept - memory[ALL].kept},
    }


def problems(row: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """Results that would be errors."""
    found = []
    if row["attention forwards"] != {NONE: 1, ALL: 2, KEPT: 1}:
        found.append(f"attention ran forward {row['attention forwards']} times a layer and step")
    if not common.worst(list(row["gradients differ"].values())) <= torch.finfo(dtype).eps:
        found.append(f"gradients differ by {row['gradients differ']}")
    extra = row["bytes of out and lse"]
    if not abs(extra["seen"] / extra["predicted"] - 1) <= 0.1:
        found.append(f"keeping attention keeps {extra['seen']} bytes, not {extra['predicted']}")
    return found


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']}, {row['kernel']}")
    for way in WAYS:
        numbers = row["seconds"][way], row["kept bytes"][way] / 2**20, row["peak bytes"][way] / 2**20
        common.say(
            f"  {way:18}  {max(numbers[0]) * 1e3:9.1f} ms   kept {numbers[1]:9.1f} MiB   peak {numbers[2]:9.1f} MiB   "
            f"{row['attention forwards'][way]:g} forwards of attention a layer"
        )
    time, extra = row["share saved"], row["bytes of out and lse"]
    common.say(f"  step shorter by {time['seen']:.1%}, predicted {time['predicted']:.1%}")
    common.say(f"  kept more: {extra['seen'] / 2**20:.1f} MiB, predicted {extra['predicted'] / 2**20:.1f} MiB")


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Plot time and memory, relative to the step without recomputation."""
    rows, ranks = record["rows"], record["ranks"]
    figure.set_size_inches(10, 4.5)
    names = [f"S = {row['seq_len']}" for row in rows]
    panels = {"Seconds of a step": seconds_of, "Bytes kept for backward": bytes_of}
    for axes, (title, measures) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        seen, predicted = zip(*map(measures, rows), strict=True)
        for n, way in enumerate(WAYS):
            places, values = [i + 0.27 * (n - 1) for i in range(len(rows))], [each[way] / each[NONE] for each in seen]
            axes.bar_label(axes.bar(places, values, 0.25, label=way), fmt="%.2f", fontsize=7)
        share = [value / each[NONE] for value, each in zip(predicted, seen, strict=True)]
        axes.plot(places, share, "k_", markersize=24, label="predicted from all recomputed")
        axes.set_xticks(range(len(rows)), names)
        axes.set_ylim(0, 1.4 * max(each[way] / each[NONE] for each in seen for way in WAYS))
        pictures.plain_axes(axes, f"{title}, {ranks} rank{'s' * (ranks > 1)}, causal zigzag", "nothing recomputed = 1")


def seconds_of(row: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Seconds of a step on the slowest rank, by method; and the prediction for keeping attention."""
    slowest = {way: max(row["seconds"][way]) for way in WAYS}
    return slowest, slowest[ALL] * (1 - row["share saved"]["predicted"])


def bytes_of(row: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Bytes kept for backward, by method; and the prediction for keeping attention."""
    kept = row["kept bytes"]
    return kept, kept[ALL] + row["bytes of out and lse"]["predicted"]


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", help="by default 16K and 64K on GPUs, 512 and 1024 on CPUs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128 if torch.cuda.is_available() else 16)
    options = parser.parse_args()
    device, rows, found = common.start(options.device), [], []
    ranks = common.ring().world_size
    for seq_len in options.seq_lens or SEQ_LENS[options.device]:
        bench = Bench(options, seq_len, device)
        rows.append(row_of(bench, options.seconds))
        found += problems(rows[-1], bench.dtype)
        report(rows[-1])
    record = {"ranks": ranks, "layers": options.layers, "rows": rows, "problems": found}
    common.save(f"checkpointing-{ranks}", options.out, record, draw)
    for problem in found:
        common.say(f"wrong: {problem}")
    common.finish()
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
