"""Wall time and host time per layer, by sequence length and number of ranks.

    python -m benchmarks.wall
    torchrun --standalone --nproc-per-node 2 -m benchmarks.wall
    torchrun --standalone --nproc-per-node 2 -m benchmarks.wall --what layers --seq-lens 4096 8192 --who ours graph

A loop of attention layers, and decoder blocks of an 8B model: causal, forward only and forward with backward. distflash
eager, with torch.compile and as a CUDA graph, in turns with others. Three times per layer: ``wall``, from an idle
device until it has finished; ``host``, until the loop returns; ``device``, between two events with the host far ahead.
Ratios are a candidate's wall time over distflash's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import distflash as df
from benchmarks import common, pictures
from benchmarks.comparison import BOTH, FORWARD, Candidate, Comparison, error_line, ours, reference_for
from benchmarks.layers import AttentionLayers, Blocks, DecoderBlock, Loop, Replayed, Sizes, calls_of
from benchmarks.peers import all_to_all, local, rings
from benchmarks.stopwatch import Stopwatch, Times

OURS, COMPILED, GRAPH = "distflash", "distflash, compiled", "distflash, graph"
WHO = ("ours", "compiled", "graph", "peers")
LAYERS, BLOCK = "layers", "block"


@dataclass(frozen=True)
class Entrant:
    """A candidate of this benchmark.

    Attributes:
        make: the candidate; raises where its library does not import.
        cp: with the layout of its tokens.
        compiled: whether its loops, too, are compiled.
    """

    name: str
    make: Callable[[], Candidate]
    cp: df.ContextParallel
    compiled: bool = False


class Bench:
    """All lengths on the ranks of this job."""

    def __init__(self, options: Any, device: torch.device) -> None:
        self.options, self.device = options, device
        self.dtype, self.mask = getattr(torch, options.dtype), df.Causal()
        self.cp = df.ContextParallel(common.ring())
        self.contiguous = df.ContextParallel(common.ring(), layout=df.Contiguous())
        self.clock = common.Clock(device, options.seconds)
        self.stopwatch = Stopwatch(device, options.seconds)
        self.sizes = Sizes(options.hidden, options.heads, options.kv_heads, options.head_dim, options.mlp)

    def row(self, what: str, seq_len: int) -> dict[str, Any]:
        """All candidates' times at one length."""
        torch.compiler.reset()  # of all lengths together there are more graphs than it keeps
        count = self.options.layers if what == LAYERS else self.options.blocks
        comparison = Comparison(self.clock, self.dtype)
        calls: dict[str, Callable[[], object]] = {}
        with ExitStack() as stack:
            for entrant in self._entrants(comparison, seq_len, stack):
                common.say(f"{what}, {seq_len} tokens: {entrant.name}")  # what a run that is cut short was at
                candidate, inputs = self._enter(comparison, entrant, seq_len)
                if candidate is None:
                    continue
                ready = partial(self._loop, what, candidate, inputs, entrant)
                loop = comparison.attempt(entrant.name, ready)
                if loop is not None:
                    calls |= self._calls(comparison, entrant.name, loop)
            times = self.stopwatch.medians(calls)
        return {
            "seq_len": seq_len,
            "shape": str(self.sizes.attention(seq_len)),
            "layers": count,
            "errors": comparison.errors,
            "left_out": comparison.left_out,
            "times": {key: asdict(per_layer(t, count)) for key, t in times.items()},
            "ratios": ratios({key: t.wall for key, t in times.items()}),
        }

    def _entrants(self, comparison: Comparison, seq_len: int, stack: ExitStack) -> list[Entrant]:
        who, own = self.options.who, ours(self.cp, seq_len)
        entrants = [Entrant(OURS, lambda: own, self.cp)]
        if "compiled" in who:
            compiled = replace(own, attend=torch.compile(own.attend))
            entrants.append(Entrant(COMPILED, lambda: compiled, self.cp, compiled=True))
        if "peers" not in who:
            return entrants
        if self.cp.world_size == 1:
            return entrants + [Entrant(name, local.MAKERS[name], self.cp) for name in (local.CUDNN, local.FLASH4)]
        zigzag = rings.makers(self.cp.transport)[rings.ZIGZAG4]
        entrants += [
            Entrant(rings.ZIGZAG4, zigzag, self.cp),
            Entrant(all_to_all.NAME, all_to_all.all_to_all, self.contiguous),
        ]
        return entrants + self._torch(comparison, seq_len, stack)

    def _torch(self, comparison: Comparison, seq_len: int, stack: ExitStack) -> list[Entrant]:
        """PyTorch's own, where it starts."""
        try:
            stack.enter_context(rings.torch_context_parallel(seq_len, self.device))
        except Exception as error:
            comparison.left_out |= dict.fromkeys(rings.TORCH, error_line(error))
            return []
        repeats = self.options.heads != self.options.kv_heads
        return [
            Entrant(name, lambda m=method: torch_candidate(m, repeats), self.cp) for name, method in rings.TORCH.items()
        ]

    def _enter(
        self, comparison: Comparison, entrant: Entrant, seq_len: int
    ) -> tuple[Candidate | None, tuple[Tensor, ...]]:
        """The candidate, if it is right on every rank, and its inputs."""
        shape, made = self.sizes.attention(seq_len), []
        inputs = common.random_inputs(shape, entrant.cp.seq_local(seq_len), self.dtype, self.device)
        right = reference_for(inputs, self.mask, entrant.cp, seq_len)

        def run() -> Any:
            made.append(entrant.make())
            return made[0].run(inputs, self.mask)

        return (made[0] if comparison.enter(entrant.name, run, right) else None), inputs

    def _loop(self, what: str, candidate: Candidate, inputs: tuple[Tensor, ...], entrant: Entrant) -> Loop:
        """It has run once."""
        if what == LAYERS:
            loop: Loop = AttentionLayers(candidate, inputs, self.mask, self.options.layers)
        else:
            loop = self._blocks(candidate, inputs[0].shape[1], entrant)
        for call in calls_of(loop).values():
            call()
        return loop

    def _blocks(self, candidate: Candidate, length: int, entrant: Entrant) -> Blocks:
        attend = candidate.on_tokens(self.mask)
        modules: list[nn.Module] = [
            DecoderBlock(self.sizes, attend, self.dtype, self.device) for _ in range(self.options.blocks)
        ]
        if entrant.compiled:
            modules = [torch.compile(module) for module in modules]
        positions = entrant.cp.positions(length * entrant.cp.world_size, self.device)
        return Blocks(modules, self.sizes, positions, self.dtype)

    def _calls(self, comparison: Comparison, name: str, loop: Loop) -> dict[str, Callable[[], object]]:
        """What is timed of a loop, and of ours the same as CUDA graphs."""
        calls = {f"{name}|{which}": call for which, call in calls_of(loop).items()}
        if name == OURS and "graph" in self.options.who:
            for which, call in calls_of(loop).items():
                if common.is_gpu(self.device):
                    graph = comparison.attempt(f"{GRAPH}|{which}", lambda call=call: Replayed(call))
                    calls |= {} if graph is None else {f"{GRAPH}|{which}": graph}
                else:
                    comparison.left_out[f"{GRAPH}|{which}"] = "CUDA graphs need a GPU"
        return calls


def torch_candidate(method: str, repeats: bool) -> Candidate:
    """PyTorch's context parallelism; its backward does not take grouped heads."""
    made = rings.torch_ring(method)
    return rings.repeated(made) if repeats else made


def per_layer(times: Times, layers: int) -> Times:
    device = None if times.device is None else times.device / layers
    return replace(times, wall=times.wall / layers, host=times.host / layers, device=device)


def ratios(wall: dict[str, float]) -> dict[str, float]:
    """Each wall time over ours, eager, of the same pass."""
    base = {key.split("|")[1]: seconds for key, seconds in wall.items() if key.startswith(f"{OURS}|")}
    return {key: seconds / base[key.split("|")[1]] for key, seconds in wall.items() if key.split("|")[1] in base}


def report(what: str, row: dict[str, Any]) -> None:
    common.say(f"\n{what}, {row['shape']}, {row['layers']} of them; a layer:")
    for key, t in row["times"].items():
        device = (
            ""
            if t["device"] is None
            else f"   device {1e3 * t['device']:8.3f} ms, wall {t['wall'] / t['device']:.2f} x"
        )
        ratio = f"   over ours {row['ratios'][key]:.2f}" if key in row["ratios"] else ""
        common.say(f"  {key:44} wall {1e3 * t['wall']:8.3f} ms   host {1e6 * t['host']:8.1f} us{device}{ratio}")
    common.say("  errors " + ", ".join(f"{n} {max(e.values()):.1e}" for n, e in row["errors"].items()))
    for name, reason in row["left_out"].items():
        common.say(f"  {name} left out: {reason}")


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Wall and host time of both passes against the length."""
    figure.set_size_inches(10, 8)
    rows, ranks = record["rows"], record["environment"]["ranks"]
    title = f"{record['what']}, {ranks} rank{'s' * (ranks > 1)}"
    names = list(dict.fromkeys(key.split("|")[0] for row in rows for key in row["times"]))
    lengths = [r["seq_len"] for r in rows]
    axes = figure.subplots(2, 2)
    for line, (time, unit, factor) in zip(axes, (("wall", "ms", 1e3), ("host", "us", 1e6)), strict=True):
        for each, which in zip(line, (FORWARD, BOTH), strict=True):
            for name in names:
                points = [(r["seq_len"], r["times"].get(f"{name}|{which}")) for r in rows]
                found = [(x, factor * t[time]) for x, t in points if t]
                each.plot(*zip(*found, strict=True) if found else ((), ()), marker="o", label=pictures.word(name))
            pictures.log_values(each)
            pictures.log_lengths(each, lengths)
            pictures.plain_axes(
                each, f"{title}, {which}", f"{time} {unit} a layer (median)", "tokens of the whole sequence"
            )


def options_of(arguments: list[str] | None = None) -> Any:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=(LAYERS, BLOCK), default=[LAYERS, BLOCK])
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO), help="ours, eager, always takes part")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--block-seq-lens", type=int, nargs="+", default=[2048, 8192], help="for decoder blocks")
    parser.add_argument("--layers", type=int, default=32, help="in the loop of attention alone")
    parser.add_argument("--blocks", type=int, default=4, help="decoder blocks, one after the other")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    return parser.parse_args(arguments)


def main() -> int:
    options = options_of()
    bench = Bench(options, common.start(options.device))
    ranks = bench.cp.world_size
    lengths = {LAYERS: options.seq_lens, BLOCK: options.block_seq_lens}
    failed = False
    for what in options.what:
        rows: list[dict[str, Any]] = []
        record = {"dtype": options.dtype, "mask": "causal", "what": what, "sizes": asdict(bench.sizes), "rows": rows}
        name = f"wall-{what}-{ranks}"
        for seq_len in lengths[what]:
            rows.append(bench.row(what, seq_len))
            report(what, rows[-1])
            common.save(name, options.out, record)
        common.save(name, options.out, record, draw)
        failed |= any(OURS in row["left_out"] for row in rows)
    common.finish()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
