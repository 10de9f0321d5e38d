"""How fast is a decoding step, compared with peers and with reading the same bytes?

    python -m benchmarks.decode                   # all shapes beside cuDNN, flash and a plain read
    python -m benchmarks.decode --flex            # and FlexAttention (compiles for a while)
    python -m benchmarks.decode --sweep           # times the knobs of our kernel instead, and prints them

One new token of each sequence attends to all previous ones. Each step is a CUDA graph; ours also appends the new key to
the cache. GB/s count keys and values, medians. "One of 2" is one rank of two without messages: half of the keys, and
the merge.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import common, pictures, reference
from benchmarks.common import Shape
from benchmarks.comparison import FORWARD, Comparison, Passes, error_line
from benchmarks.peers import local
from distflash.kernels.base import Scores
from distflash.kernels.decoding import Store, Table
from distflash.kernels.triton.decoding_launches import Knobs, TritonDecoding

OURS, READ = "distflash", "plain read"
BACKENDS = {local.CUDNN: SDPBackend.CUDNN_ATTENTION, local.FLASH: SDPBackend.FLASH_ATTENTION}
SHAPES = [
    Shape(1, 131072, 32, 8, 128, 128),
    Shape(1, 131072, 64, 8, 128, 128),
    Shape(1, 16384, 32, 8, 128, 128),
    Shape(32, 8192, 32, 8, 128, 128),
]
# Of which one is timed alone: what it computes, without the messages.
RANKS = (2, 8)
# Every step appends a key: room for more steps than anybody times.
STEPS = 1024
CHUNK = 4096


@triton.jit
def read_kernel(x, found, CHUNK: tl.constexpr):
    """The maximum of each chunk of int32: reads memory, and does little else."""
    numbers = tl.load(x + tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK), eviction_policy="evict_first")
    tl.store(found + tl.program_id(0), tl.max(numbers, 0))


@dataclass(frozen=True)
class Exact:
    """The float64 reference of one token per sequence; compare `reference.Reference`."""

    out: Tensor

    def errors(self, out: Tensor) -> dict[str, float]:
        return {"out": float((out.double() - self.out).norm() / self.out.norm())}

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor) -> Exact:
        """Of ``q [B, 1, H, D]`` over all of ``k [B, S, G, D]`` and ``v [B, S, G, V]``, one sequence at a time."""
        outs = []
        for b in range(len(q)):
            queries = q[b, 0].double().unflatten(0, (k.shape[2], -1))
            s = torch.einsum("ghd,sgd->ghs", queries, k[b].double()) * q.shape[-1] ** -0.5
            outs.append(torch.einsum("ghs,sgd->ghd", s.softmax(-1), v[b].double()).flatten(0, 1))
        return Exact(torch.stack(outs)[:, None])


class Step:
    """distflash's step, on a cache of all keys except the last, which is the new one."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        B, S, G, room = shape.B, shape.S, shape.G, shape.S + STEPS
        self.q, k, v, _ = (x.detach() for x in common.random_inputs(shape, 1, dtype, device))
        generator = torch.Generator(device).manual_seed(1)
        kept = (torch.randn(B, room, G, d, generator=generator, device=device, dtype=dtype) for d in (shape.D, shape.V))
        positions = torch.arange(room, dtype=torch.int32, device=device).expand(B, room).contiguous()
        numbers = (torch.full(size, S - 1, dtype=torch.int32, device=device) for size in ((B, 1), (B,)))
        self.store = Store(*kept, positions, *numbers, torch.zeros(1, dtype=torch.int32, device=device))
        self.new = k, v
        self.store.k[:, S - 1], self.store.v[:, S - 1] = k[:, 0], v[:, 0]
        hi = torch.arange(1, room + 1, dtype=torch.int32, device=device)
        self.table = Table(0, torch.stack([torch.zeros_like(hi), hi])[None, :, None].contiguous())

    @property
    def bytes(self) -> int:
        """Of keys and values that a step reads."""
        s = self.shape
        return s.B * s.S * s.G * (s.D + s.V) * self.q.element_size()

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        return self.store.k[:, : self.shape.S], self.store.v[:, : self.shape.S]

    def passes(self, decoding: TritonDecoding) -> Passes:
        self.rewind()
        scores = Scores(self.shape.D**-0.5)

        def call() -> Tensor:
            return decoding.alone(self.q, *self.new, self.store, self.table, scores, None)[0]

        out = call().clone()
        return Passes({FORWARD: as_graph(call)}, {"out": out})

    def share(self, decoding: TritonDecoding, ranks: int) -> Callable[[], object]:
        """The step of one of so many ranks by itself: its share of the keys, and a merge of as many messages."""
        held = (self.shape.S - 1) // ranks
        at_hand = held + STEPS
        counts = torch.full((1, ranks), held, dtype=torch.int32, device=self.q.device)
        whole = self.store
        store = Store(
            whole.k[:, :at_hand],
            whole.v[:, :at_hand],
            whole.positions[:, :at_hand] * ranks,
            counts,
            torch.full_like(whole.lengths, held * ranks),
            torch.zeros_like(whole.fault),
        )
        scores = Scores(self.shape.D**-0.5)

        def call() -> Tensor:
            message = decoding.attend(self.q, *self.new, store, self.table, scores, 0)
            return decoding.merge(message.expand(ranks, *message.shape).contiguous(), self.q, store, None)[0]

        call()
        return as_graph(call)

    def rewind(self) -> None:
        self.store.lengths.fill_(self.shape.S - 1)
        self.store.counts.fill_(self.shape.S - 1)

    def peer(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Passes:
        """Somebody's attention of ``[B, H, 1, D]`` over ``[B, G, S, D]``, contiguous as they like it."""
        q, k, v = (x.transpose(1, 2).contiguous() for x in (self.q, *self.keys))
        out = attend(q, k, v).transpose(1, 2).clone()
        return Passes({FORWARD: as_graph(lambda: attend(q, k, v))}, {"out": out})

    def read(self) -> Callable[[], object]:
        # The keys of a batch are not contiguous: as many bytes from the beginning of the cache.
        k, v = (x.flatten().view(torch.int32) for x in (self.store.k, self.store.v))
        programs = self.bytes // 8 // CHUNK
        found = torch.empty(programs, dtype=torch.int32, device=k.device)

        def call() -> None:
            for x in (k, v):
                read_kernel[(programs,)](x, found, CHUNK=CHUNK, num_warps=4)

        call()
        return as_graph(call)


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call, which has run before, as a CUDA graph; on a CPU unchanged."""
    if not torch.cuda.is_available():
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result, call

    return replay


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def row_of(shape: Shape, options: Any, device: torch.device) -> dict[str, Any]:
    """One shape: check all candidates, then time them in turns."""
    dtype = getattr(torch, options.dtype)
    step = Step(shape, dtype, device)
    comparison: Any = Comparison(common.Clock(device, options.seconds), dtype, passes=(FORWARD,))
    right = Exact.of(step.q, *step.keys)
    decoding = TritonDecoding()
    comparison.enter(OURS, lambda: step.passes(decoding), right)
    for name, backend in BACKENDS.items():
        comparison.enter(name, lambda backend=backend: step.peer(sdpa(backend)), right)
    if options.flex:
        comparison.enter(local.FLEX, lambda: step.peer(flex()), right)
    calls = {name.removesuffix(f"|{FORWARD}"): call for name, call in comparison.calls.items()} | {READ: step.read()}
    if shape.B == 1:
        calls |= {f"{OURS}, one of {ranks}": step.share(decoding, ranks) for ranks in RANKS}
    timings = comparison.clock.medians(calls)
    # Of the whole sequence's keys and values, also where a rank has a share of them.
    rates = {name: step.bytes / timing.seconds / 1e9 for name, timing in timings.items()}
    ratios = {name: rates[OURS] / rate for name, rate in rates.items() if name != OURS and OURS in rates}
    return {
        "shape": str(shape),
        **asdict(shape),
        "bytes": step.bytes,
        "knobs": repr(decoding._device(step.q, step.new[1]).knobs),
        "errors": comparison.errors,
        "left_out": comparison.left_out,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "gb_per_s": rates,
        "ratios": ratios,
    }


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']}, {row['knobs']}")
    for name, rate in row["gb_per_s"].items():
        error = row["errors"].get(name, {"out": 0.0})["out"]
        ratio = f"   ours is {row['ratios'][name]:.3f} of it" if name in row["ratios"] else ""
        seconds = row["timings"][name]["seconds"]
        common.say(f"  {name:20} {rate:7.0f} GB/s   {1e6 * seconds:7.1f} us   error {error:.1e}{ratio}")
    for name, reason in row["left_out"].items():
        common.say(f"  {name:20} left out: {reason}")


def draw(figure: Any, record: dict[str, Any]) -> None:
    figure.set_size_inches(10, 0.75 * len(record["rows"]) + 1.8)
    rows = record["rows"]
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["gb_per_s"]))
    for n, name in enumerate(names):
        places = [i + 0.8 * (n + 0.5) / len(names) - 0.4 for i in range(len(rows))]
        rates = [row["gb_per_s"].get(name, 0.0) for row in rows]
        bars = axes.barh(places, rates, 0.8 / len(names), label=pictures.word(name))
        axes.bar_label(bars, [f" {rate:,.0f}" if rate else "" for rate in rates], fontsize=8)
    axes.set_yticks(range(len(rows)), [pictures.shape(row["shape"]) for row in rows])
    axes.invert_yaxis()
    pictures.plain_axes(axes, "One new token, one GPU", "", "GB/s of all keys and values (median)")
    axes.grid(False)
    pictures.legend_above(figure, axes, len(names))


# -------------------------------------------------------------------------------------------------------------- knobs


def candidates() -> list[Knobs]:
    """Tuning parameters to try: 32 to 200 KB in flight per multiprocessor."""
    found = []
    for keys, warps, stages, programs in itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 5), (1, 2, 3)):
        flight = keys * 512 * (stages - 1) * programs
        if 2**15 <= flight <= 200 * 2**10 and (keys, warps) != (32, 8):
            found.append(Knobs(keys, warps, stages, programs))
    return found


def precompile(job: tuple[Shape, Knobs]) -> None:
    """In a separate process, compile into triton's cache. Failures appear again when it is timed."""
    shape, knobs = job
    try:
        step = Step(shape, torch.bfloat16, torch.device("cuda"))
        TritonDecoding(knobs).alone(step.q, *step.new, step.store, step.table, Scores(0.1), None)
    except Exception:
        pass


def sweep(shapes: list[Shape], options: Any, device: torch.device) -> list[dict[str, Any]]:
    """Time all tuning parameters on each shape, and cuDNN."""
    knobs = candidates()[:2] if options.tiny else candidates()
    if device.type == "cuda":
        jobs = list(itertools.product(shapes, knobs))
        with concurrent.futures.ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(precompile, jobs, chunksize=4))
    results = []
    for shape in shapes:
        step = Step(shape, torch.bfloat16, device)
        right, clock = Exact.of(step.q, *step.keys), common.Clock(device, options.seconds / 10)
        rows = [timed(step, each, right, clock) for each in knobs]
        results += rows
        common.say(f"\n{shape}: plain read {step.bytes / clock.medians({READ: step.read()})[READ].seconds / 1e9:.0f}")
        for row in sorted(rows, key=lambda row: -row["gb_per_s"])[: options.top]:
            common.say(f"  {row['gb_per_s']:7.0f} GB/s  {row['knobs']}  {row['failure']}")
    return results


def timed(step: Step, knobs: Knobs, right: Exact, clock: common.Clock) -> dict[str, Any]:
    row = {"shape": str(step.shape), "knobs": repr(knobs), "gb_per_s": 0.0, "failure": ""}
    try:
        passes = step.passes(TritonDecoding(knobs))
        if reference.wrong(right.errors(**passes.results), torch.bfloat16):
            return row | {"failure": "wrong result"}
        seconds = clock.medians({OURS: passes.calls[FORWARD]})[OURS].seconds
    except Exception as error:
        return row | {"failure": error_line(error)}
    return row | {"gb_per_s": step.bytes / seconds / 1e9}


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--flex", action="store_true", help="FlexAttention besides")
    parser.add_argument("--sweep", action="store_true", help="time the knobs of our kernel instead")
    parser.add_argument("--top", type=int, default=8, help="how many knobs of each shape to print")
    parser.add_argument("--tiny", action="store_true", help="200 tokens: tries the benchmark itself out")
    options = parser.parse_args()
    device = common.start(options.device)
    shapes = [replace(shape, B=min(shape.B, 2), S=200) for shape in SHAPES] if options.tiny else SHAPES
    if options.sweep:
        common.save("decode-sweep", options.out, {"rows": sweep(shapes, options, device)})
        return 0
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        rows.append(row_of(shape, options, device))
        report(rows[-1])
        common.save("decode", options.out, {"dtype": options.dtype, "rows": rows})
    common.save("decode", options.out, {"dtype": options.dtype, "rows": rows}, draw)
    return int(any(OURS in row["left_out"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
