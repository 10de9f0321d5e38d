"""What do attention dropout and a deterministic backward cost on one GPU?

    python -m benchmarks.dropout          # minutes; writes benchmarks/results/dropout.json and .png
    python -m benchmarks.dropout --tiny   # tries the benchmark itself out, also without a GPU

Kernels alone: forward, and backward with its preprocess kernel, as cuDNN's and FlashAttention-2's have it in theirs.
All candidates of a row take turns in one run. TFLOP/s count allowed pairs only, dropped ones among them.

Ours is held against float64 under `distflash.dropout_mask`. What others drop is not known: their results without
dropout are held against float64, and `dropped` looks at what they drop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import distflash as df
from benchmarks import common, pictures, reference
from benchmarks.common import Shape
from benchmarks.comparison import BACKWARD, FORWARD, Candidate, Comparison, Passes, kernel_of, reference_for
from benchmarks.kernels import MASKS, bare, ratios
from benchmarks.peers import local
from distflash.dropout import Dropout, as_seed, dropout_of
from distflash.kernels import Problem
from distflash.kernels.base import Kernel

P, SEED = 0.1, 20261130
OURS, WITHOUT = "distflash", "distflash, without dropout"
DEFAULT, IN_ORDER = "default", "deterministic"
PEERS = {local.CUDNN: SDPBackend.CUDNN_ATTENTION, local.FLASH: SDPBackend.FLASH_ATTENTION}
COLORS = {OURS: "#1f5fa8", WITHOUT: "#7fb2e5", local.CUDNN: "#2ca02c", local.FLASH: "#8c6d4f"}
TABLE = [(Shape(1, 16384, 16, 16, D, D), mask) for D in (64, 128) for mask in MASKS]
ORDERED = [
    (Shape(B, S, H, G, D, D), mask)
    for D in (64, 128)
    for B, S in ((8, 2048), (1, 16384))
    for H, G in ((16, 16), (32, 8))
    for mask in MASKS
]


def dropped(peer: Candidate, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """How far a candidate's dropout is off: errors of the share kept, of what is kept, and in backward.

    Scores are 0, and there are as many keys as columns of the values, which are the identity. So out is the matrix of
    probabilities after dropout. As the gradient of out is the identity, too, dV is the transpose of backward's.
    """
    zeros = torch.zeros(8, dim, 16, dim, dtype=dtype, device=device)
    identity = torch.eye(dim, dtype=dtype, device=device)[None, :, None].expand_as(zeros)
    found = peer.run((zeros, zeros, identity, identity), df.Full()).results
    out, dv = (found[name].detach().float() for name in ("out", "dv"))
    kept = out[out != 0]
    return {
        "share kept": abs(float((out != 0).float().mean()) / (1 - P) - 1),
        "kept": float((kept * dim * (1 - P) - 1).abs().max()) if len(kept) else float("nan"),
        "dropped in backward": float((dv - out.transpose(1, 3)).norm() / out.norm()),
    }


@dataclass(frozen=True)
class Bench:
    """Both questions on one device."""

    dtype: torch.dtype
    clock: common.Clock

    def rates(self, shape: Shape, mask_name: str) -> dict[str, Any]:
        """One row of dropout: ours with and without it, and others with it."""
        device, mask, alone = self.clock.device, MASKS[mask_name], df.ContextParallel(df.transport.Alone())
        inputs = common.random_inputs(shape, shape.S, self.dtype, device)
        kernel, ours = kernel_of(alone, inputs), dropout_of(P, as_seed(SEED, device))
        right = reference_for(inputs, mask, alone, shape.S)
        thinned = reference_for(inputs, mask, alone, shape.S, reference.Dropped(P, SEED))
        comparison = Comparison(self.clock, self.dtype)
        comparison.enter(OURS, lambda: self._bare(inputs, mask, kernel, ours), thinned)
        comparison.enter(WITHOUT, lambda: self._bare(inputs, mask, kernel), right)
        for name, backend in PEERS.items():
            self._enter(comparison, name, lambda p, b=backend: local.sdpa(b, p), inputs, mask, right)
        row = self._row(shape, mask_name, comparison)
        rates = row["tflops"]
        own = {w: rates[f"{OURS}|{w}"] / rates[f"{WITHOUT}|{w}"] for w in (FORWARD, BACKWARD) if f"{OURS}|{w}" in rates}
        return row | {"kernel": repr(kernel), "ratios": ratios(rates), "of own rate": own}

    def in_order(self, shape: Shape, mask_name: str) -> dict[str, Any]:
        """One row of the deterministic backward: its rate and the default's, without dropout."""
        mask, alone = MASKS[mask_name], df.ContextParallel(df.transport.Alone())
        inputs = common.random_inputs(shape, shape.S, self.dtype, self.clock.device)
        right = reference_for(inputs, mask, alone, shape.S)
        comparison = Comparison(self.clock, self.dtype, (BACKWARD,))
        for name, kernel in ((DEFAULT, df.kernels.Hopper()), (IN_ORDER, df.kernels.Hopper(deterministic=True))):
            comparison.enter(name, lambda kernel=kernel: self._bare(inputs, mask, supported(kernel, inputs)), right)
        row = self._row(shape, mask_name, comparison)
        pair = [row["tflops"].get(f"{name}|{BACKWARD}") for name in (IN_ORDER, DEFAULT)]
        return row | {"share": None if None in pair else pair[0] / pair[1]}

    def _bare(
        self, inputs: tuple[Tensor, ...], mask: df.Mask, kernel: Kernel, dropout: Dropout | None = None
    ) -> Passes:
        return bare(inputs, mask, kernel, dropout, with_preprocess=True)

    def _enter(
        self,
        comparison: Comparison,
        name: str,
        make: Callable[[float], Candidate],
        inputs: tuple[Tensor, ...],
        mask: df.Mask,
        right: reference.Reference,
    ) -> None:
        """Add somebody else's attention with dropout. make: of a rate."""

        def work() -> tuple[Passes, dict[str, float]]:
            plain = make(0.0).run(inputs, mask)
            errors = right.errors(**plain.results)
            return make(P).run(inputs, mask), errors | dropped(
                make(P), inputs[0].shape[-1], self.dtype, inputs[0].device
            )

        if (found := comparison.attempt(name, work)) is None:
            return
        passes, comparison.errors[name] = found
        if reference.wrong(comparison.errors[name], self.dtype):
            comparison.left_out[name] = "wrong result"
            return
        comparison.calls |= {f"{name}|{which}": passes.calls[which] for which in comparison.passes}

    def _row(self, shape: Shape, mask_name: str, comparison: Comparison) -> dict[str, Any]:
        work = common.flops(shape, common.pairs_of(MASKS[mask_name], shape.S))
        return {"shape": str(shape), "mask": mask_name, **asdict(shape)} | comparison.row(lambda _, which: work[which])


def supported(kernel: Kernel, inputs: tuple[Tensor, ...]) -> Kernel:
    """The kernel, or a ValueError with all reasons why it does not take such inputs."""
    q, k, v, _ = inputs
    reasons = kernel.not_supported_reasons(Problem(q.device, q.dtype, q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
    if reasons:
        raise ValueError("; ".join(reasons))
    return kernel


def report(row: dict[str, Any]) -> None:
    """Every candidate of a row: milliseconds, TFLOP/s, and shares."""
    common.say(f"\n{row['shape']} {row['mask']}")
    for key, rate in row["tflops"].items():
        name, which = key.split("|")
        words = f"{1e3 * row['timings'][key]['seconds']:8.3f} ms {rate:6.1f} TFLOP/s"
        if "of own rate" in row and name == OURS:
            words += f"   {row['of own rate'][which]:.3f} of its rate without dropout"
        elif key in row.get("ratios", {}):
            words += f"   ours takes {1 / row['ratios'][key]:.3f} of its time"
        elif row.get("share") and name == IN_ORDER:
            words += f"   {row['share']:.3f} of the default's rate"
        common.say(f"  {name:28} {which:8} {words}")
    for name, reason in row["left_out"].items():
        common.say(f"  {name:28} left out: {reason}")


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Rates with dropout by shape, forward and backward, and the deterministic backward's share by shape."""
    rows, ordered = record["rows"], record["deterministic"]
    figure.set_size_inches(12, 0.32 * max(len(ordered), 2 * len(rows)) + 2)
    *panels, last = figure.subplots(1, 3)
    for axes, which in zip(panels, (FORWARD, BACKWARD), strict=True):
        for name, color in COLORS.items():
            rates = [row["tflops"].get(f"{name}|{which}", float("nan")) for row in rows]
            axes.scatter(rates, range(len(rows)), c=color, s=60, label=pictures.word(name))
        _name_rows(axes, rows)
        pictures.plain_axes(axes, f"Dropout, p = {record['p']}, {which}", "", "TFLOP/s (median)")
    shares = [float("nan") if row["share"] is None else row["share"] for row in ordered]
    last.barh(range(len(ordered)), shares, color=COLORS[OURS])
    _name_rows(last, ordered)
    pictures.plain_axes(last, "Deterministic backward", "", "of the default's rate")


def _name_rows(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(rows)), [f"{pictures.shape(row['shape'])}, {row['mask']}" for row in rows], fontsize=8)
    axes.set_xlim(left=0)
    axes.invert_yaxis()


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="64 tokens: tries the benchmark itself out")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("the kernels run on GPUs, and there is none here; --tiny tries the benchmark itself out on a CPU")
    bench = Bench(getattr(torch, options.dtype), common.Clock(common.start(options.device), options.seconds))
    record: dict[str, Any] = {"dtype": options.dtype, "p": P, "rows": [], "deterministic": []}
    for name, table, measure in (("rows", TABLE, bench.rates), ("deterministic", ORDERED, bench.in_order)):
        for shape, mask in table:
            record[name].append(measure(replace(shape, B=1, S=64) if options.tiny else shape, mask))
            report(record[name][-1])
            common.save("dropout", options.out, record)
    common.save("dropout", options.out, record, draw)
    return int(any(OURS in row["left_out"] for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
