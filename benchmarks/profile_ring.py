"""A timeline of ring attention on each GPU, forward and backward, with the gaps in which it waits.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.profile_ring
    torchrun --standalone --nproc-per-node 2 -m benchmarks.profile_ring --seq-len 16384 --mask documents
    python -m benchmarks.profile_ring                                                # one GPU

Writes a timeline of torch's profiler (one row a stream of each rank), all kernels with their times, and lists the gaps
of more than 5 us in the stream that computes attention. The profiler costs the host time: it starts ahead of the device
by --ahead, so that gaps are the device's. With --ahead 0 those that a slow host makes show as well.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

import distflash as df
from benchmarks import common, pictures, trace
from benchmarks.comparison import BACKWARD, FORWARD, kernel_of, ours, reference_for
from benchmarks.reference import wrong
from benchmarks.trace import Span
from benchmarks.workloads import LAYOUTS, MASKS

WARM_UP = 3
MARKED_GAPS = 12
COLORS = {trace.FORWARD: "C0", trace.BACKWARD: "C1", trace.NCCL: "C2", trace.COPY: "C3", trace.OTHER: "#999999"}


def traced(options: Any, device: torch.device) -> tuple[list[Span], dict[str, Any]]:
    """All ranks' spans of one forward and backward, after a check and a warm-up."""
    shape = common.shape_of(options, options.seq_len)
    dtype = getattr(torch, options.dtype)
    cp = df.ContextParallel(common.ring(), layout=LAYOUTS[options.layout], schedule=df.Ring())
    mask = MASKS[options.mask](shape.S)
    cp = cp.with_mask(mask)
    inputs = common.random_inputs(shape, cp.seq_local(shape.S), dtype, device)
    passes = ours(cp, shape.S).run(inputs, mask)
    errors = reference_for(inputs, mask, cp, shape.S).errors(**passes.results)
    facts = {"shape": str(shape), "errors": errors, "right": not wrong(errors, dtype)}
    facts["kernel"] = repr(kernel_of(cp, inputs))

    def step() -> None:
        if dist.is_initialized():
            dist.barrier()
        if common.is_gpu(device):
            torch.cuda.synchronize()
            torch.cuda._sleep(int(options.ahead * 1e-3 * common.CYCLES_PER_SECOND))
        passes.calls[FORWARD]()
        passes.calls[BACKWARD]()
        if common.is_gpu(device):
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step()
    exported = _profiled(step, device)
    return trace.together(_gathered((exported.get("baseTimeNanoseconds", 0), trace.spans_of(exported, cp.rank)))), facts


def _profiled(step: Any, device: torch.device) -> dict[str, Any]:
    """The exported trace of one step; the one before it takes the profiler's own beginnings."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if common.is_gpu(device) else [])]
    with profile(activities=kinds, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as profiler:
        for _ in range(2):
            step()
            profiler.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text())


def _gathered(part: Any) -> list[Any]:
    """Every rank's object."""
    if not dist.is_initialized():
        return [part]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, part)
    return every


def report(record: dict[str, Any], least: float) -> None:
    common.say(f"\n{record['shape']} {record['mask']}, {record['layout']}, {record['kernel']}")
    for rank, sums in enumerate(record["summary"]):
        parts = ", ".join(f"{kind} {us:.0f}" for kind, us in sums.items())
        common.say(f"  rank {rank}, us: {parts or 'no attention kernel in the trace'}")
    common.say(f"  gaps of more than {least:g} us between attention kernels:")
    for gap in record["gaps"]:
        meanwhile = ", ".join(f"{kind} {us:.0f} us" for kind, us in gap["meanwhile"].items()) or "nothing"
        common.say(
            f"    rank {gap['rank']} at {gap['start']:10.1f}  {gap['duration']:8.1f} us  after {gap['after']}, "
            f"before {gap['before']}; meanwhile {meanwhile}"
        )
    if not record["gaps"]:
        common.say("    none")


def draw(figure: Any, record: dict[str, Any]) -> None:
    """One row a stream of each rank. White is a gap; the longest of those listed are marked, often too short to see."""
    spans = [Span(**kernel) for kernel in record["kernels"]]
    rows = sorted({(span.rank, span.stream) for span in spans})
    figure.set_size_inches(10, 0.6 * len(rows) + 1.8)
    axes = figure.subplots()
    for kind in trace.KINDS:
        for n, row in enumerate(rows):
            bars = [(s.start / 1e3, s.duration / 1e3) for s in spans if (s.rank, s.stream) == row and s.kind == kind]
            if bars:
                axes.broken_barh(bars, (n - 0.4, 0.8), facecolors=COLORS[kind], edgecolor="none")
        axes.broken_barh([], (0, 0), facecolors=COLORS[kind], label=kind)
    for gap in sorted(record["gaps"], key=lambda gap: -gap["duration"])[:MARKED_GAPS]:
        stream = trace.compute_stream([span for span in spans if span.rank == gap["rank"]])
        place = gap["start"] / 1e3, rows.index((gap["rank"], stream)) - 0.42
        axes.annotate(f"{gap['duration']:.0f} us", place, fontsize=8, ha="center", va="bottom")
    axes.set_yticks(range(len(rows)), [f"rank {rank}, stream {stream}" for rank, stream in rows], fontsize=8)
    axes.invert_yaxis()
    ranks = record["environment"]["ranks"]
    title = f"{pictures.shape(record['shape'])}, {record['mask']}, {record['layout']}, {ranks} rank{'s' * (ranks > 1)}"
    pictures.plain_axes(axes, f"{title}: forward, then backward", "", "ms")
    axes.grid(False)
    pictures.legend_above(figure, axes, len(trace.KINDS))


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--mask", choices=list(MASKS), default="causal")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="zigzag")
    common.add_sizes(parser)
    parser.add_argument("--ahead", type=float, default=10.0, help="milliseconds by which the host starts ahead")
    parser.add_argument("--least-gap", type=float, default=5.0, help="microseconds of the shortest gap listed")
    parser.add_argument("--name", help="of the files; by default profile-<mask>-<ranks>")
    options = parser.parse_args()
    device = common.start(options.device)
    spans, facts = traced(options, device)
    ranks = common.ring().world_size
    by_rank = [[s for s in spans if s.rank == rank] for rank in range(ranks)]
    record = {
        **facts,
        "mask": options.mask,
        "layout": options.layout,
        "ahead_ms": options.ahead,
        "summary": [trace.summary(own) for own in by_rank],
        "gaps": [asdict(gap) for own in by_rank for gap in trace.gaps_of(own, options.least_gap)],
        "kernels": [asdict(span) for span in spans],
    }
    report(record, options.least_gap)
    if facts["right"]:
        name = options.name or f"profile-{options.mask}-{ranks}"
        common.save(name, options.out, record, draw)
    else:
        common.say(f"wrong result, nothing written: {facts['errors']}")
    common.finish()
    return int(not facts["right"])


if __name__ == "__main__":
    sys.exit(main())
