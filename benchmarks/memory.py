"""How much memory does ring attention take besides inputs and results, measured and predicted?

    torchrun --standalone --nproc-per-node 2 -m benchmarks.memory
    python -m benchmarks.memory                                          # one GPU, no ring
    torchrun --standalone --nproc-per-node 8 -m benchmarks.memory        # 8 ranks, on one GPU too, if that has room

Peak bytes of forward beyond q, k, v, out and lse, and of backward beyond those, dout, dq, dk and dv, on each rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import distflash as df
from benchmarks import common, pictures
from benchmarks.common import Shape
from benchmarks.comparison import kernel_of
from distflash.intervals import Intervals
from distflash.kernels.hopper.tiles import QUERIES
from distflash.overlap import overlap
from distflash.plan import Gradients, Pass, Plan, Stage, TensorKey, Transfer, What

FP32 = 4
COUNTER = 2 * 4  # int32 [2], of a kernel whose programs share out their work as they go


@dataclass(frozen=True)
class Extra:
    """Bytes beyond inputs and results at the peak of each direction."""

    forward: int
    backward: int


def predict(shape: Shape, plan: Plan, itemsize: int, adds_up: bool) -> Extra:
    """What a rank allocates as it walks a plan in which keys travel, at its peak.

    With B batch, T this rank's queries, K its keys, H and G query and key heads, D and V head dims, E bytes an element,
    F = 4 bytes of an accumulator (8 for float64),

        row     = B T H                                one number per query and head
        keys(n) = B n G (D + V)                        one number per element of n tokens' K and V

    forward  = F row (V + 2)    running softmax, if it is kept between passes
             + 12 (T + n)       bytes of intervals for every pass over n keys: kept for all layers and steps
             + 8                a counter
             + the most, over the stages, of
               E keys(n)        for every source whose n keys are stored or arriving: from the stage in which they
                                start to the last one that reads or sends them
               E keys(n)        for n keys that are sent as a copy: several ranges, or a part of each row of a batch
    backward = 2 F row          lse in base 2, and delta = rowsum(dout out)
             + F row D          sum of dQ, if several passes add to it; always, if the kernel adds up in memory
                                (adds_up), of T and D up to a multiple of 64, and then 8 for a counter
             + F keys(K)        dK and dV of the own keys, if anything is added to them
             + the most, over the stages, of the two as in forward and of
               F keys(n)        for every source whose n keys are worked on: until its dK and dV have been sent, which
                                takes the stage after
               F keys(n)        for every part of n keys that arrives; the last one stays, if it is of all K keys
               F keys(n)        while a pass over n keys adds to dK and dV
               - E keys(K)      until the end, where dK and dV are rounded into buffers of their own

    For a causal zigzag ring of W > 2 ranks of T tokens each and 2-byte elements this is at most
    forward 4 B T H (V + 2) + 4 B T G (D + V), backward about 4 B T H D + 18 B T G (D + V): nothing grows with W.
    """
    account = _Account(shape, plan, itemsize, adds_up)
    return Extra(account.forward(), account.backward())


class _Held:
    """Bytes by what they are for, and the most that were held at a time."""

    def __init__(self) -> None:
        self.bytes: dict[object, int] = {}
        self.peak = 0

    def take(self, name: object, size: int) -> None:
        self.bytes[name] = size
        self.peak = max(self.peak, sum(self.bytes.values()))

    def give_up(self, name: object) -> None:
        self.bytes.pop(name, None)


@dataclass(frozen=True)
class _Account:
    """The terms of `predict`."""

    shape: Shape
    plan: Plan
    itemsize: int
    adds_up: bool

    @property
    def wide(self) -> int:
        return max(FP32, self.itemsize)

    @property
    def length(self) -> int:
        """T: the plan knows its queries by its passes; a rank without any has as many as it has keys."""
        return next((len(rows.row_lo) for rows in self._intervals()), self.plan.lengths[self.plan.rank])

    @property
    def row(self) -> int:
        return self.shape.B * self.length * self.shape.H

    def keys(self, tokens: int) -> int:
        return self.shape.B * tokens * self.shape.G * (self.shape.D + self.shape.V)

    def forward(self) -> int:
        held, plan = _Held(), self.plan
        held.take("intervals", sum(3 * 4 * (len(i.row_lo) + len(i.col_lo)) for i in self._intervals()))
        held.take("counter", COUNTER)
        held.take("softmax", plan.keeps_partials * self.wide * self.row * (self.shape.V + 2))
        for _ in self._walk(plan.forward, plan.done_with[0], held):
            pass
        return held.peak

    def backward(self) -> int:
        held, plan = _Held(), self.plan
        own = self.keys(plan.lengths[plan.rank])
        added = self._adds_to_own_keys()
        held.take("own dK, dV", own * (self.wide if added else self.itemsize))
        for stage in self._walk(plan.backward, plan.done_with[1], held):
            for each in stage.passes:
                self._compute(each, held)
        if added and (self.wide > self.itemsize or _LAST in held.bytes):
            held.take("rounded dK, dV", own * self.itemsize)
        return held.peak - own * self.itemsize  # the results

    def _compute(self, each: Pass, held: _Held) -> None:
        """What the first pass of a rank's queries, and of a source, makes room for; and what one that adds does."""
        shape, rank = self.shape, self.plan.rank
        held.take("lse and delta", 2 * self.wide * self.row)
        if self.adds_up:
            held.take("dQ", _sums(shape, self.length) + COUNTER)
        elif self.plan.keeps_sums(rank):
            held.take("dQ", self.wide * self.row * shape.D)
        if each.gradients is Gradients.OF_QUERIES:
            return
        if each.adds:
            held.take("part", self.wide * self.keys(len(each.visible[0].keys)))
            held.give_up("part")
        for source in each.sources:
            if source != rank:
                held.take((What.KEY_GRADIENTS, source), self.wide * self.keys(self._at_hand(source)))

    def _walk(self, stages: Sequence[Stage], done_with: Sequence[frozenset[TensorKey]], held: _Held) -> Iterator[Stage]:
        """The stages, with what their transfers hold."""
        until: dict[object, int] = {}
        for number, stage in enumerate(stages):
            for transfer in stage.transfers:
                name, size = self._room(transfer)
                if size:
                    held.take(name, size)
                if transfer.sends or transfer.what is What.KEY_GRADIENTS:
                    until[name] = transfer.until
            yield stage
            for name in [name for name, stop in until.items() if stop == number + 1 and name != _LAST]:
                held.give_up(name)
            for name in done_with[number]:
                held.give_up(name)

    def _room(self, transfer: Transfer) -> tuple[object, int]:
        """What a transfer holds, and bytes that it makes room for as it starts."""
        if transfer.what is What.KEY_GRADIENTS:
            if transfer.sends:
                return (What.KEY_GRADIENTS, transfer.of), 0
            name = _LAST if transfer is self._last_part() else ("arriving", transfer)
            return name, self.wide * self.keys(transfer.count)
        assert transfer.what is What.KEYS, "keys travel, not queries"
        size = self.itemsize * self.keys(transfer.count)
        if not transfer.sends:
            return (What.KEYS, transfer.of), size
        rows = transfer.rows or (range(transfer.count),)
        copied = len(rows) > 1 or (self.shape.B > 1 and transfer.count < self._at_hand(transfer.of))
        return ("copy", transfer), size * copied

    def _at_hand(self, source: int) -> int:
        """How many of a source's keys this rank has."""
        return self.plan.lengths[source] if source == self.plan.rank else sum(map(len, self.plan.rows[source]))

    def _adds_to_own_keys(self) -> bool:
        rank = self.plan.rank
        return bool(self.plan.arrivals[What.KEY_GRADIENTS]) or any(
            each.adds for each in self.plan.backward_passes if rank in each.sources
        )

    def _last_part(self) -> Transfer | None:
        """The last part of the own keys' gradients that arrives, if it is of all of them."""
        parts = [t for s in self.plan.backward for t in s.transfers if t.what is What.KEY_GRADIENTS and not t.sends]
        last = max(parts, key=lambda t: (t.until, parts.index(t)), default=None)
        return last if last is not None and last.count == self.plan.lengths[self.plan.rank] else None

    def _intervals(self) -> list[Intervals]:
        """All that the plan keeps, each once."""
        stages = (*self.plan.forward, *self.plan.backward)
        return list({id(rows): rows for s in stages for each in s.passes for rows in each.visible}.values())


_LAST = "the last part of dK, dV to arrive"


def _sums(shape: Shape, length: int) -> int:
    """Bytes of the Hopper kernel's sums of dQ."""
    return FP32 * shape.B * shape.H * -(-length // QUERIES) * QUERIES * -(-shape.D // 64) * 64


def _peak(work: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Peak bytes during ``work`` beyond what was there before and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = work()
    torch.cuda.synchronize()
    returned = sum(t.numel() * t.element_size() for t in results)
    return torch.cuda.max_memory_allocated() - before - returned, results


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Extra, Extra]:
    """(predicted, measured) on this rank."""
    cp = df.ContextParallel(common.ring(), layout=df.Zigzag(), schedule=df.Ring())  # new: no intervals kept yet
    mask, length = df.Causal(), cp.seq_local(shape.S)
    q, k, v, dout = common.random_inputs(shape, length, dtype, device)
    forward, (out, lse) = _peak(lambda: df.attention(q, k, v, mask=mask, cp=cp, seq_len=shape.S, return_lse=True))
    backward, _grads = _peak(lambda: torch.autograd.grad(out, (q, k, v), dout))
    kernel = kernel_of(cp, (q, k, v))
    adds_up = kernel.preprocess(q, out, lse, dout, None).dq_accum is not None
    abilities = kernel.abilities(device)
    plan = overlap(cp.plan(mask, shape.S, device), shape.G, shape.B, abilities, cp.transport.intra_node)
    return predict(shape, plan, q.element_size(), adds_up), Extra(forward, backward)


def row_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    predicted, measured = measure(shape, device, dtype)
    row: dict[str, Any] = {"shape": str(shape), "seq_len": shape.S}
    for direction in ("forward", "backward"):
        p, m = (common.over_ranks(getattr(x, direction), device) for x in (predicted, measured))
        row[direction] = {
            "predicted": p,
            "measured": m,
            "ratio": [a / b if b else None for a, b in zip(p, m, strict=True)],
        }
    return row


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']}")
    for direction in ("forward", "backward"):
        p, m, ratio = (row[direction][key][0] for key in ("predicted", "measured", "ratio"))
        share = f"{ratio:.3f}" if ratio else "-"
        common.say(f"  {direction:8}  predicted {p / 2**20:9.1f} MiB   measured {m / 2**20:9.1f} MiB   ratio {share}")


def draw(figure: Any, record: dict[str, Any]) -> None:
    rows, ranks = record["rows"], record["ranks"]
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    lengths = [row["seq_len"] for row in rows]
    for n, direction in enumerate(("forward", "backward")):
        for kind, style in (("measured", "o"), ("predicted", "-")):
            values = [max(row[direction][kind]) / 2**30 for row in rows]
            axes.plot(lengths, values, style, color=f"C{n}", label=f"{direction}, {kind}")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    pictures.log_lengths(axes, lengths)
    title = f"Peak memory beyond inputs and results, {ranks} ranks, causal zigzag"
    pictures.plain_axes(axes, title, "GiB a rank", "tokens of the whole sequence")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[16384, 65536, 131072, 262144])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    if options.device == "cpu":
        print("torch counts memory on GPUs only; tests/pure/test_memory.py checks the formula without one")
        return 1
    device = common.start(options.device, timed=False)
    ranks = common.ring().world_size

    def shape(seq_len: int) -> Shape:
        return Shape(1, seq_len, options.heads, options.kv_heads, options.head_dim, options.head_dim)

    measure(shape(2048), device, torch.bfloat16)  # compiles, connects
    rows = []
    for seq_len in options.seq_lens:
        rows.append(row_of(shape(seq_len), device, torch.bfloat16))
        report(rows[-1])
    common.save(f"memory-{ranks}", options.out, {"ranks": ranks, "rows": rows}, draw)
    ratios = [r for row in rows for d in ("forward", "backward") for r in row[d]["ratio"] if r]
    worst = max((abs(r - 1) for r in ratios), default=0.0)
    common.say(f"formula within {worst:.1%} of what was measured")
    common.finish()
    # Alone there is next to nothing to measure: the caching allocator's granularity decides.
    return int(worst > 0.1 and ranks > 1)


if __name__ == "__main__":
    sys.exit(main())
