"""What does context parallelism cost? TFLOP/s per GPU of the ring, and its fraction of the single-GPU rate.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring --peers
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring --schedules ulysses all-gather
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring --seq-lens 1048576
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring --mask window4096 --layout contiguous

The single-GPU rate is measured in the same run, in turns with the ring, on every GPU: the same kernel and mask, with a
length that gives one GPU as much work as each has in the ring. Both times are the slowest GPU's, since GPUs of one host
differ by 1 to 2%. The record has the times of all.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import distflash as df
from benchmarks import common, pictures, reference
from benchmarks.common import Shape
from benchmarks.comparison import BACKWARD, FORWARD, Comparison, error_line, kernel_of, ours, reference_for
from benchmarks.peers import rings
from benchmarks.workloads import DENSE, LAYOUTS, MASKS, balance
from distflash.schedules import Schedule

RING, SINGLE = "ring", "single"
SCHEDULES: dict[str, Schedule] = {
    "all-gather": df.AllGather(),
    "ulysses": df.Ulysses(),
    "double-ring": df.DoubleRing(),
    "pass-query": df.PassQuery(),
}


def single_length(mask: str, seq_len: int, ranks: int, longest: int) -> int:
    """A length at which one GPU has the work of one rank of the ring, in whole tiles: pairs grow as S^2, or as S."""
    share = ranks**0.5 if mask in DENSE else ranks
    return min(longest, max(256, round(seq_len / share / 256) * 256))


class Bench:
    """One mask and layout over all ranks."""

    def __init__(self, options: Any, device: torch.device) -> None:
        self.options, self.device = options, device
        self.dtype = getattr(torch, options.dtype)
        self.alone = df.ContextParallel(df.transport.Alone())
        self.cp = self._by(df.Ring())
        self.clock = common.Clock(device, options.seconds)

    def _by(self, schedule: Schedule) -> df.ContextParallel:
        return df.ContextParallel(common.ring(), layout=LAYOUTS[self.options.layout], schedule=schedule)

    def row(self, seq_len: int) -> dict[str, Any]:
        shape = common.shape_of(self.options, seq_len)
        longest = self.options.single_max
        single = replace(shape, S=single_length(self.options.mask, seq_len, self.cp.world_size, longest))
        comparison = Comparison(self.clock, self.dtype)
        row: dict[str, Any] = {"shape": str(shape), "seq_len": seq_len, "single": str(single)}
        with ExitStack() as stack:
            inputs, right = self._enter(comparison, RING, shape, self.cp)
            self._enter(comparison, SINGLE, single, self.alone)
            for name in self.options.schedules:
                self._enter(comparison, name, shape, self._by(SCHEDULES[name]))
            if self.options.peers:
                self._enter_peers(comparison, shape, inputs, right, stack)
            shared, whole = self._work(shape, self.cp), self._work(single, self.alone)
            row |= comparison.row(lambda name, which: (whole if name == SINGLE else shared)[which])
        mask = self._mask(shape)
        plan = self.cp.with_mask(mask).plan(mask, shape.S, self.device)
        row |= {"exchanges": plan.exchanges, "pairs": plan.pairs.tolist(), "balance": balance(plan.pairs)}
        row |= {"kernel": repr(kernel_of(self.cp, inputs)), "share": shares(row["tflops"])}
        return row

    def _mask(self, shape: Shape) -> df.Mask:
        return MASKS[self.options.mask](shape.S)

    def _work(self, shape: Shape, cp: df.ContextParallel) -> dict[str, float]:
        """Floating-point operations of each of the ranks of ``cp``, on average."""
        total = common.flops(shape, common.pairs_of(self._mask(shape), shape.S))
        return {which: flops / cp.world_size for which, flops in total.items()}

    def _enter(
        self, comparison: Comparison, name: str, shape: Shape, cp: df.ContextParallel
    ) -> tuple[tuple[Tensor, ...], reference.Reference]:
        """Ours: what it raises ends the command on this rank, and torchrun ends the others."""
        mask = self._mask(shape)
        cp = cp.with_mask(mask)
        inputs = common.random_inputs(shape, cp.seq_local(shape.S), self.dtype, self.device)
        right = reference_for(inputs, mask, cp, shape.S)
        comparison.check(name, ours(cp, shape.S).run(inputs, mask), right)
        return inputs, right

    def _enter_peers(
        self,
        comparison: Comparison,
        shape: Shape,
        inputs: tuple[Tensor, ...],
        right: reference.Reference,
        stack: ExitStack,
    ) -> None:
        if self.options.mask != "causal" or self.options.layout != "zigzag" or shape.S % (2 * self.cp.world_size):
            comparison.left_out["peers"] = "take causal masks, and lengths that divide into equal zigzag shards only"
            return
        mask = self._mask(shape)
        for name, make in rings.makers(self.cp.transport).items():
            comparison.enter(name, lambda make=make: make().run(inputs, mask), right)
        try:
            stack.enter_context(rings.torch_context_parallel(shape.S, self.device))
        except Exception as error:
            comparison.left_out |= dict.fromkeys(rings.TORCH, error_line(error))
            return
        for name, method in rings.TORCH.items():
            peer = rings.torch_ring(method)
            if not comparison.enter(name, lambda peer=peer: peer.run(inputs, mask), right) and shape.H != shape.G:
                again = rings.repeated(peer)
                comparison.enter(f"{name}, K and V repeated", lambda peer=again: peer.run(inputs, mask), right)


def shares(tflops: dict[str, float]) -> dict[str, dict[str, float]]:
    """For each candidate and pass: its share of the single-GPU rate, and the ring's rate over its."""
    found: dict[str, dict[str, float]] = {}
    for key, rate in tflops.items():
        name, which = key.split("|")
        single, ring = (tflops.get(f"{base}|{which}") for base in (SINGLE, RING))
        found[key] = {}
        if name != SINGLE and single:
            found[key]["of single"] = rate / single
        if name not in (SINGLE, RING) and ring:
            found[key]["ring over it"] = ring / rate
    return found


def report(row: dict[str, Any]) -> None:
    common.say(
        f"\n{row['shape']}, {row['exchanges']} exchanges of keys, most work of a rank {row['balance']:.3f} of the mean "
        f"(single GPU: {row['single']}), {row['kernel']}"
    )
    for key, rate in row["tflops"].items():
        share = "".join(f"   {what} {x:.1%}" for what, x in row["share"][key].items())
        time = row["timings"][key]
        common.say(
            f"  {key:32} {rate:7.1f} TFLOP/s per GPU   {1e3 * time['seconds']:9.2f} ms   "
            f"host {1e3 * time['host']:6.2f} ms{share}"
        )
    common.say("  errors " + ", ".join(f"{n} {max(e.values()):.1e}" for n, e in row["errors"].items()))
    for name, reason in row["left_out"].items():
        common.say(f"  {name} left out: {reason}")


def draw(figure: Any, record: dict[str, Any]) -> None:
    figure.set_size_inches(10, 5)
    rows, ranks = record["rows"], record["environment"]["ranks"]
    names = list(dict.fromkeys(key.split("|")[0] for row in rows for key in row["tflops"]))
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), (FORWARD, BACKWARD), strict=True):
        for name in names:
            points = [(r["seq_len"], r["tflops"].get(f"{name}|{direction}")) for r in rows]
            points = [p for p in points if p[1]]
            style = "--" if name == SINGLE else "-"
            label = f"{pictures.word(name)}, as much work" if name == SINGLE else pictures.word(name)
            axes.plot([x for x, _ in points], [y for _, y in points], style, marker="o", label=label)
        axes.set_ylim(bottom=0)
        pictures.log_lengths(axes, [r["seq_len"] for r in rows])
        title = f"{record['mask']}, {record['layout']}, {ranks} ranks, {direction}"
        pictures.plain_axes(axes, title, "TFLOP/s per GPU (median)", "tokens of the whole sequence")
    pictures.legend_above(figure, axes, 3)


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[16384, 65536, 131072])
    parser.add_argument("--mask", choices=list(MASKS), default="causal")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="zigzag")
    common.add_sizes(parser)
    parser.add_argument("--single-max", type=int, default=131072, help="longest sequence on a single GPU")
    parser.add_argument("--peers", action="store_true", help="other people's rings besides")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=[], help="our other schedules besides")
    parser.add_argument("--name", help="of the files; by default ring-<mask>-<ranks>")
    options = parser.parse_args()
    device = common.start(options.device)
    bench = Bench(options, device)
    ranks = bench.cp.world_size
    name = options.name or f"ring-{options.mask}-{ranks}"
    rows: list[dict[str, Any]] = []
    record = {"dtype": options.dtype, "mask": options.mask, "layout": options.layout, "rows": rows}
    for seq_len in options.seq_lens:
        rows.append(bench.row(seq_len))
        report(rows[-1])
        common.save(name, options.out, record)
    common.save(name, options.out, record, draw)
    common.finish()
    return int(any(own in row["left_out"] for row in rows for own in (RING, SINGLE)))


if __name__ == "__main__":
    sys.exit(main())
