"""The rate of a ring's passes without communication: one GPU computes each rank's passes.

    python -m benchmarks.ring_steps                                       # 8 ranks, a window of 4096, 128K tokens
    python -m benchmarks.ring_steps --mask causal --layout contiguous
    python -m benchmarks.ring_steps --compare                             # and with all rows in all passes, forward

Random keys stand in for what would arrive, nothing is sent, and parts of dK and dV are not added up. So this is what
splitting a call into passes costs: launches, blocks that are begun more than once, and the float32 state between
passes. Rates are over allowed pairs. The dense rate is that of a causal mask in one pass of the whole sequence, in the
same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import distflash as df
from benchmarks import common, pictures
from benchmarks.comparison import BACKWARD, FORWARD, kernel_of
from benchmarks.workloads import LAYOUTS, MASKS
from distflash.engine import keys_of
from distflash.exchange import Exchange
from distflash.geometry import Geometry
from distflash.gradients import GradientBuffers
from distflash.kernels import Kernel
from distflash.kernels.base import Scores
from distflash.overlap import overlap
from distflash.partial import Partial
from distflash.plan import Plan, What

DENSE = "dense"
ALL_ROWS = ", all rows"  # behind the names of cases in which each pass works on all rows
Calls = dict[str, Callable[[], object]]


class Alone:
    """A rank's passes over random tensors."""

    def __init__(self, plan: Plan, shape: common.Shape, kernel: Kernel, dtype: torch.dtype, device: torch.device):
        self.plan, self.kernel, self.scores = plan, kernel, Scores(shape.D**-0.5)
        tokens = plan.lengths[plan.rank]
        inputs = (x.detach() for x in common.random_inputs(shape, tokens, dtype, device))
        self.q, k, v, self.dout = inputs
        self.kv = {plan.rank: (k, v)}
        for source, rows in plan.rows.items():
            count = sum(map(len, rows))
            self.kv[source] = tuple(torch.randn_like(x[:, :1].expand(-1, count, -1, -1)) for x in (k, v))
        self.saved = self.forward()

    def forward(self) -> tuple[Tensor, Tensor]:
        into = Partial.empty(self.q, self.kv[self.plan.rank][1].shape[-1], between=self.plan.keeps_partials)
        exchange = self._exchange((self.q,))
        for each in self.plan.passes:
            self.kernel.forward(self.q, keys_of(each, exchange), each, self.scores, into)
        return into.final, into.lse

    def backward(self) -> object:
        exchange = self._exchange((self.q, *self.saved, self.dout))
        gradients = GradientBuffers(exchange, self.kernel, self.scores, rounds_keys=True)
        for each in self.plan.backward_passes:
            gradients.compute(each, *keys_of(each, exchange))
        return gradients.finish()

    def calls(self, name: str) -> Calls:
        self.backward()  # compiled before it is timed
        return {f"{name}|{FORWARD}": self.forward, f"{name}|{BACKWARD}": self.backward}

    def _exchange(self, queries: tuple[Tensor, ...]) -> Exchange:
        """An exchange that already has all tensors that the passes read."""
        exchange = Exchange(self.plan, df.transport.Alone(), {})
        exchange.tensors |= {(What.KEYS, source): kv for source, kv in self.kv.items()}
        exchange.tensors[What.QUERIES, self.plan.rank] = queries
        return exchange


def plans_of(options: Any, mask: df.Mask, ranks: int, kernel: Kernel, device: torch.device) -> list[Plan]:
    """Of all ranks, as a call over GPUs of one host has them."""
    geometry = Geometry.of_sequence(mask, LAYOUTS[options.layout].under(mask), options.seq_len, ranks)
    able = kernel.abilities(device)
    plans = [df.Ring().plan(geometry, rank).to(device) for rank in range(ranks)]
    return [overlap(plan, options.kv_heads, 1, able, intra_node=True) for plan in plans]


def with_all_rows(plan: Plan) -> Plan:
    return plan.with_passes(lambda each: (replace(each, live=None),))


def measure(options: Any, device: torch.device) -> dict[str, Any]:
    shape, dtype = common.shape_of(options, options.seq_len), getattr(torch, options.dtype)
    clock = common.Clock(device, options.seconds)
    alone = df.ContextParallel(df.transport.Alone())
    kernel = kernel_of(alone, common.random_inputs(shape, 16, dtype, device))
    (dense,) = plans_of(options, df.Causal(), 1, kernel, device)
    work = {}
    for plan in plans_of(options, MASKS[options.mask](options.seq_len), options.ranks, kernel, device):
        work[f"rank {plan.rank}"] = plan
        if options.compare:
            work[f"rank {plan.rank}{ALL_ROWS}"] = with_all_rows(plan)
    calls = Alone(dense, shape, kernel, dtype, device).calls(DENSE)
    cases = {}
    for name, plan in work.items():
        # In turns with the dense call, whose rate falls as the GPU gets warm.
        timings = clock.medians(calls | Alone(plan, shape, kernel, dtype, device).calls(name))
        pairs = {n: int(p.pairs[p.rank].sum()) for n, p in ((DENSE, dense), (name, plan))}
        cases[name] = {"rows": rows_of(plan)}
        for which in (FORWARD, BACKWARD):
            seconds = {n: timings[f"{n}|{which}"].seconds for n in pairs}
            rates = {n: common.flops(shape, pairs[n])[which] / seconds[n] / 1e12 for n in pairs}
            share = rates[name] / rates[DENSE]
            cases[name][which] = {"seconds": seconds[name], "tflops": rates[name], "share": share}
    return {"shape": str(shape), "kernel": repr(kernel), "cases": cases}


def rows_of(plan: Plan) -> list[int]:
    """How many rows each forward pass works on."""
    return [len(each.visible[0].row_lo) if each.live is None else each.live.count for each in plan.passes]


def report(record: dict[str, Any], title: str) -> None:
    common.say(title)
    for name, case in record["cases"].items():
        line = f"  {name:20}"
        for which in (FORWARD, BACKWARD):
            found = case[which]
            line += f" {which} {found['seconds'] * 1e3:8.3f} ms {found['tflops']:6.1f} TFLOP/s"
            line += f" = {found['share']:6.1%} of dense  "
        common.say(f"{line} forward rows {case['rows']}")
    for which in (FORWARD, BACKWARD):
        for name in ("", ALL_ROWS):
            shares = [c[which]["share"] for n, c in record["cases"].items() if n.endswith("rows") == bool(name)]
            if shares:
                common.say(f"  {which}{name}: slowest {min(shares):.1%}, mean {sum(shares) / len(shares):.1%} of dense")


def draw(figure: Any, record: dict[str, Any]) -> None:
    """A line for each rank, and for each way of choosing rows a bar."""
    cases = record["cases"]
    ranks = [name for name in cases if not name.endswith(ALL_ROWS)]
    ways = {"": "rows that see a key in the pass", ALL_ROWS: "all rows in all passes"}
    figure.set_size_inches(10, 0.45 * len(ranks) + 1.8)
    for axes, which in zip(figure.subplots(1, 2, sharey=True), (FORWARD, BACKWARD), strict=True):
        for n, (way, label) in enumerate(ways.items()):
            found = [cases.get(f"{name}{way}") for name in ranks]
            shares = [case[which]["share"] if case else 0.0 for case in found]
            if any(shares):
                bars = axes.barh([at + 0.4 * (n - 0.5) for at in range(len(ranks))], shares, 0.38, label=label)
                axes.bar_label(bars, fmt=" {:.0%}", fontsize=8)
        axes.set_yticks(range(len(ranks)), ranks)
        axes.set_xlim(0, 1.1)
        pictures.plain_axes(axes, f"{pictures.shape(record['shape'])}, {which}", "", "share of the dense rate")
        axes.grid(False)
    axes.invert_yaxis()
    pictures.legend_above(figure, axes, 2)


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--mask", choices=list(MASKS), default="window4096")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="zigzag")
    parser.add_argument("--compare", action="store_true", help="all rows in all passes besides")
    common.add_sizes(parser)
    options = parser.parse_args()
    record = measure(options, common.start(options.device))
    title = f"{record['shape']}, {options.mask}, {options.layout}, {options.ranks} ranks"
    report(record, f"{title}, {record['kernel']}")
    name = f"ring-steps-{options.mask}-{options.layout}-{options.ranks}"
    common.save(name, options.out, record, draw)
    common.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
