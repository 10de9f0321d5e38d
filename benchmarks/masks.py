"""How do masks affect the rate? TFLOP/s over allowed pairs, forward and backward, relative to a causal mask.

    python -m benchmarks.masks                                          # one GPU
    python -m benchmarks.masks --peers --flex                           # and flash-attn-4, and FlexAttention
    python -m benchmarks.masks --masks blocks --seq-len 65536 --flex --name masks-blocks
    torchrun --standalone --nproc-per-node 2 -m benchmarks.masks        # one GPU, and a ring over all of them

A causal window of 4096 keys, causal packed documents whose lengths are drawn log-uniformly from 256 to 32K, the window
and the first 4 keys, continuations of 1024 tokens of one prompt of 4096, and packed videos that are causal by blocks of
4096, on 128K tokens. The dense rate is that of the same kernel under a causal mask, on one GPU, in the same run.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch

import distflash as df
from benchmarks import common, pictures
from benchmarks.comparison import BACKWARD, FORWARD, Comparison, kernel_of, ours, reference_for
from benchmarks.peers import local
from benchmarks.workloads import LAYOUTS, MASKS, balance

DENSE = "causal"
SPARSE = ("window4096", "documents", "streaming", "rollouts", "blocks")
OURS = "distflash"


class Bench:
    """All masks on one sequence length, by everybody who takes them."""

    def __init__(self, options: Any, device: torch.device) -> None:
        self.options, self.device = options, device
        self.shape = common.shape_of(options, options.seq_len)
        self.comparison = Comparison(common.Clock(device, options.seconds), getattr(torch, options.dtype))
        self.work: dict[str, dict[str, float]] = {}
        self.cases: list[dict[str, Any]] = []

    def enter(self, cp: df.ContextParallel, peers: tuple[str, ...]) -> str:
        """Everybody on every mask, over the ranks of ``cp``; gives the kernel that ours takes."""
        S, ranks = self.shape.S, cp.world_size
        inputs = common.random_inputs(self.shape, cp.seq_local(S), self.comparison.dtype, self.device)
        # One candidate for all masks: what one compiled is kept until all are timed.
        makers = {peer: cache(local.MAKERS[peer]) for peer in peers}
        for mask_name in (DENSE, *self.options.masks):
            mask = MASKS[mask_name](S)
            pairs = cp.plan(mask, S, self.device).pairs
            right = reference_for(inputs, mask, cp, S)
            # What ours raises ends the command: the other ranks would wait for it.
            self.comparison.check(self._case(OURS, mask_name, ranks, pairs), ours(cp, S).run(inputs, mask), right)
            for peer, make in makers.items():
                name = self._case(peer, mask_name, ranks, pairs)
                self.comparison.enter(name, lambda make=make, m=mask: make().run(inputs, m), right)
        return repr(kernel_of(cp, inputs))

    def _case(self, who: str, mask: str, ranks: int, pairs: torch.Tensor) -> str:
        name = f"{who}, {mask}, {ranks} rank" + ("s" if ranks > 1 else "")
        total = common.flops(self.shape, int(pairs.sum()))
        self.work[name] = {which: flops / ranks for which, flops in total.items()}
        case = {"name": name, "who": who, "mask": mask, "ranks": ranks, "pairs": int(pairs.sum())}
        self.cases.append(case | {"balance": balance(pairs)})
        return name

    def record(self) -> dict[str, Any]:
        row = self.comparison.row(lambda name, which: self.work[name][which])
        return {"shape": str(self.shape), "cases": self.cases, **row, "share": shares(self.cases, row["tflops"])}


def shares(cases: list[dict[str, Any]], tflops: dict[str, float]) -> dict[str, float]:
    """Each rate over the same candidate's dense rate on one GPU."""
    dense = {c["who"]: c["name"] for c in cases if c["mask"] == DENSE and c["ranks"] == 1}
    found = {}
    for case in cases:
        for which in (FORWARD, BACKWARD):
            rate, base = (tflops.get(f"{name}|{which}") for name in (case["name"], dense.get(case["who"])))
            if rate is not None and base is not None and case["name"] != dense[case["who"]]:
                found[f"{case['name']}|{which}"] = rate / base
    return found


def report(record: dict[str, Any]) -> None:
    common.say(f"\n{record['shape']}, {record['kernel']}, {record['layout']}")
    for case in record["cases"]:
        name = case["name"]
        if name in record["left_out"]:
            common.say(f"  {name:34} left out: {record['left_out'][name]}")
            continue
        worst = max(record["errors"][name].values())
        line = f"  {name:34} {case['pairs']:.2e} pairs, balance {case['balance']:.3f}, error {worst:.1e}"
        for which in (FORWARD, BACKWARD):
            share = record["share"].get(f"{name}|{which}")
            dense = "" if share is None else f" = {share:.1%} of dense"
            line += f"   {which} {record['tflops'][f'{name}|{which}']:6.1f} TFLOP/s per GPU{dense}"
        common.say(line)


def draw(figure: Any, record: dict[str, Any]) -> None:
    """A group of bars for each mask and number of ranks, a colour for each candidate."""
    cases = [case for case in record["cases"] if case["name"] not in record["left_out"]]
    groups = list(dict.fromkeys((case["mask"], case["ranks"]) for case in cases))
    whose = list(dict.fromkeys(case["who"] for case in cases))
    figure.set_size_inches(10, 0.7 * len(groups) + 1.8)
    for axes, which in zip(figure.subplots(1, 2, sharey=True), (FORWARD, BACKWARD), strict=True):
        for n, who in enumerate(whose):
            own = [case for case in cases if case["who"] == who]
            places = [groups.index((c["mask"], c["ranks"])) + 0.8 * (n + 0.5) / len(whose) - 0.4 for c in own]
            rates = [record["tflops"].get(f"{case['name']}|{which}", 0.0) for case in own]
            percents = [record["share"].get(f"{case['name']}|{which}") for case in own]
            bars = axes.barh(places, rates, 0.75 / len(whose), label=pictures.word(who))
            axes.bar_label(bars, ["" if x is None else f" {x:.0%} of causal" for x in percents], fontsize=8)
        axes.set_yticks(range(len(groups)), [f"{pictures.word(mask)}\n{gpus(ranks)}" for mask, ranks in groups])
        axes.margins(x=0.3)
        pictures.plain_axes(
            axes, f"{pictures.shape(record['shape'])}, {which}", "", "TFLOP/s per GPU over allowed pairs"
        )
        axes.grid(False)
    axes.invert_yaxis()
    pictures.legend_above(figure, axes, len(whose))


def gpus(count: int) -> str:
    return "one GPU" if count == 1 else f"{count} GPUs"


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--layout", choices=list(LAYOUTS), default="zigzag")
    common.add_sizes(parser)
    parser.add_argument("--masks", nargs="+", choices=SPARSE, default=SPARSE, help="which ones beside the dense one")
    parser.add_argument("--peers", action="store_true", help="flash-attn-4 on one GPU besides")
    parser.add_argument("--flex", action="store_true", help="FlexAttention on one GPU besides")
    parser.add_argument("--name", help="of the record; by default masks and the number of ranks")
    options = parser.parse_args()
    device = common.start(options.device)
    bench = Bench(options, device)
    peers = (local.FLASH4,) * options.peers + (local.FLEX,) * options.flex
    kernel = bench.enter(df.ContextParallel(df.transport.Alone()), peers)
    ring = common.ring()
    if ring.world_size > 1:
        bench.enter(df.ContextParallel(ring, layout=LAYOUTS[options.layout], schedule=df.Ring()), ())
    record = {"dtype": options.dtype, "layout": options.layout, "kernel": kernel, **bench.record()}
    report(record)
    common.save(options.name or f"masks-{ring.world_size}", options.out, record, draw)
    common.finish()
    return int(any(name.startswith(OURS) for name in record["left_out"]))


if __name__ == "__main__":
    sys.exit(main())
