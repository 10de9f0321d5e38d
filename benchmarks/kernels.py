"""How fast is attention on one GPU, forward and backward, compared with peers?

    python -m benchmarks.kernels --quick          # 16K and 2K tokens beside cuDNN and flash-attn-4 only
    python -m benchmarks.kernels                  # and grouped heads at 32K, all peers but FlexAttention
    python -m benchmarks.kernels --flex --more    # and FlexAttention (compiles for a while), head dims 256 and 192/128

Peers that do not import, or do not support a shape, are left out with the reason. TFLOP/s count allowed pairs only.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import distflash as df
from benchmarks import common, pictures
from benchmarks.common import Shape
from benchmarks.comparison import BACKWARD, FORWARD, Comparison, Passes, kernel_of, ours, reference_for
from benchmarks.peers import local
from distflash.dropout import Dropout
from distflash.kernels.base import Kernel, KeyGradient, Keys, QueryGradient, Scores
from distflash.overlap import overlap
from distflash.partial import Partial

OURS, PORTABLE, BARE = "distflash", "distflash, portable", "distflash, bare"
REPEATS = "distflash, deterministic"
# Whose figures ours are held against.
RIVALS = (local.CUDNN, local.FLASH4)
COLORS = {
    OURS: "#1f5fa8", PORTABLE: "#7fb2e5", REPEATS: "#12406e", local.CUDNN: "#2ca02c", local.FLASH4: "#d9541e",
    local.FLASH: "#8c6d4f", local.FLEX: "#b565b5",
}  # fmt: skip
MARKERS = {REPEATS: "P", local.CUDNN: "s", local.FLASH4: "D", local.FLASH: "v", local.FLEX: "^"}
MASKS: dict[str, df.Mask] = {"full": df.Full(), "causal": df.Causal()}
TABLE = [
    *((Shape(1, 16384, 16, 16, 128, 128), mask) for mask in MASKS),
    *((Shape(1, 16384, 32, 32, 64, 64), mask) for mask in MASKS),
    *((Shape(8, 2048, 16, 16, 128, 128), mask) for mask in MASKS),
    *((Shape(8, 2048, 32, 32, 64, 64), mask) for mask in MASKS),
]
GROUPED = [(Shape(1, 32768, 32, 8, 128, 128), mask) for mask in MASKS]
MORE = [
    *((Shape(1, 16384, 8, 8, 256, 256), mask) for mask in MASKS),
    *((Shape(1, 16384, 16, 16, 192, 128), mask) for mask in MASKS),
]


def bare(
    inputs: tuple[Tensor, ...],
    mask: df.Mask,
    kernel: Kernel,
    dropout: Dropout | None = None,
    with_preprocess: bool = False,
) -> Passes:
    """Distflash's kernel without autograd, engine and allocation; backward with or without the preprocess kernel."""
    q, k, v, dout = (x.detach() for x in inputs)
    plan = df.ContextParallel(df.transport.Alone()).plan(mask, q.shape[1], q.device)
    plan = overlap(plan, k.shape[2], q.shape[0], kernel.abilities(q.device), intra_node=True)
    (only,), (back,) = plan.passes, plan.backward_passes
    keys, scores = Keys(k, v, only.visible[0]), Scores(q.shape[-1] ** -0.5, dropout=dropout)
    into = Partial.empty(q, v.shape[-1], between=False)
    dq = QueryGradient(torch.empty_like(q), None)
    dkv = KeyGradient(torch.empty_like(k), torch.empty_like(v))

    def forward() -> None:
        kernel.forward(q, (keys,), only, scores, into)

    forward()
    saved = kernel.preprocess(q, into.final, into.lse, dout, None)

    def backward() -> None:
        context = kernel.preprocess(q, into.final, into.lse, dout, None) if with_preprocess else saved
        kernel.backward(context, keys, back, scores, dq, dkv)

    backward()
    results = {"out": into.final, "dq": dq.final, "dk": dkv.dk, "dv": dkv.dv}
    return Passes({FORWARD: forward, BACKWARD: backward}, results)


@dataclass(frozen=True)
class Bench:
    """All candidates on one device."""

    peers: tuple[str, ...]
    dtype: torch.dtype
    clock: common.Clock
    with_portable: bool

    def row(self, shape: Shape, mask_name: str) -> dict[str, Any]:
        """One shape: check all candidates, then time them in turns."""
        mask = MASKS[mask_name]
        alone = df.ContextParallel(df.transport.Alone())
        inputs = common.random_inputs(shape, shape.S, self.dtype, self.clock.device)
        right = reference_for(inputs, mask, alone, shape.S)
        kernel = kernel_of(alone, inputs)
        comparison = Comparison(self.clock, self.dtype)
        comparison.enter(OURS, lambda: ours(alone, shape.S).run(inputs, mask), right)
        comparison.enter(BARE, lambda: bare(inputs, mask, kernel), right)
        if self.with_portable and not isinstance(kernel, df.kernels.Triton):
            portable = df.ContextParallel(df.transport.Alone(), kernel=df.kernels.Triton())
            comparison.enter(PORTABLE, lambda: ours(portable, shape.S).run(inputs, mask), right)
        if self.with_portable and isinstance(kernel, df.kernels.Hopper):
            repeats = df.ContextParallel(df.transport.Alone(), kernel=df.kernels.Hopper(deterministic=True))
            comparison.enter(REPEATS, lambda: ours(repeats, shape.S).run(inputs, mask), right)
        for name in self.peers:
            comparison.enter(name, lambda make=local.MAKERS[name]: make().run(inputs, mask), right)
        work = common.flops(shape, common.pairs_of(mask, shape.S))
        row = {"shape": str(shape), "mask": mask_name, **asdict(shape), "kernel": repr(kernel)}
        row |= comparison.row(lambda name, which: work[which])
        return row | {"ratios": ratios(row["tflops"])}


def ratios(tflops: dict[str, float]) -> dict[str, float]:
    """Distflash's rate over each other candidate's, by pass."""
    found = {}
    for key, rate in tflops.items():
        name, which = key.split("|")
        mine = tflops.get(f"{OURS}|{which}")
        if name != OURS and mine is not None:
            found[key] = mine / rate
    return found


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']} {row['mask']}, {row['kernel']}")
    names = dict.fromkeys(key.split("|")[0] for key in row["tflops"])
    for name in names:
        worst = max(row["errors"][name].values())
        common.say(
            f"  {name:20} {_both(row['tflops'], name, '6.1f')} TFLOP/s   error {worst:.1e}   "
            f"host {1e6 * row['timings'][f'{name}|{FORWARD}']['host']:.0f} us   "
            + (f"ours is {_both(row['ratios'], name, '.3f')} of it" if name != OURS else "")
        )
    for name, reason in row["left_out"].items():
        common.say(f"  {name:20} left out: {reason}")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: distflash's rates, and their ratios to others'."""
    head = ["shape", "TFLOP/s fwd / bwd", *(f"over {rival}" for rival in RIVALS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row['shape']} {row['mask']}", _both(row["tflops"], OURS, ".0f")]
        cells += [_both(row["ratios"], rival, ".3f") for rival in RIVALS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _both(values: dict[str, float], name: str, form: str) -> str:
    """The values of forward and backward; a dash where there is none."""
    pair = (values.get(f"{name}|{which}") for which in (FORWARD, BACKWARD))
    return " / ".join("-" if x is None else format(x, form) for x in pair)


def draw(figure: Any, record: dict[str, Any]) -> None:
    """A line for each shape, with a dot for each candidate."""
    rows = record["rows"]
    names = dict.fromkeys(key.split("|")[0] for row in rows for key in row["tflops"])
    names = [name for name in names if name != BARE]  # it would lie on ours
    figure.set_size_inches(10, 0.42 * len(rows) + 1.7)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, (FORWARD, BACKWARD), strict=True):
        for name in names:  # ours is large, and below the others
            rates = [row["tflops"].get(f"{name}|{direction}") for row in rows]
            look = {"s": 150 if name == OURS else 40, "c": COLORS.get(name), "marker": MARKERS.get(name, "o")}
            axes.scatter(rates, range(len(rows)), label=pictures.word(name), **look)
        axes.set_yticks(range(len(rows)), [f"{pictures.shape(row['shape'])}, {row['mask']}" for row in rows])
        axes.set_xlim(left=0)
        pictures.plain_axes(axes, f"One GPU, {direction}", "", "TFLOP/s (median)")
        axes.grid(axis="both", alpha=0.3)
    panels[0].invert_yaxis()
    pictures.legend_above(figure, panels[0], 3)


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16K and 2K tokens, cuDNN and flash-attn-4 only")
    parser.add_argument("--more", action="store_true", help="head dims 256 and 192/128 besides")
    parser.add_argument("--flex", action="store_true", help="FlexAttention besides")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="256 tokens: tries the benchmark itself out")
    parser.set_defaults(seconds=0.3)  # there are many candidates
    options = parser.parse_args()
    device = common.start(options.device)
    peers = RIVALS if options.quick else (local.FLASH, *RIVALS)
    peers += (local.FLEX,) if options.flex else ()
    dtype = getattr(torch, options.dtype)
    bench = Bench(peers, dtype, common.Clock(device, options.seconds), with_portable=not options.quick)
    rows: list[dict[str, Any]] = []
    for shape, mask in TABLE + ([] if options.quick else GROUPED) + (MORE if options.more else []):
        rows.append(bench.row(replace(shape, S=256) if options.tiny else shape, mask))
        report(rows[-1])
        common.save("kernels", options.out, {"dtype": options.dtype, "rows": rows})
    common.save("kernels", options.out, {"dtype": options.dtype, "rows": rows}, draw)
    common.say(f"\n{table(rows)}")
    return int(any(OURS in row["left_out"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
