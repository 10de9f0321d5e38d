"""Packed documents over many ranks: `Balanced` compared with `Zigzag`.

    python -m benchmarks.packing counts                                          # no GPU: pairs and keys, counted
    torchrun --standalone --nproc-per-node 2 -m benchmarks.packing rates          # both layouts and one GPU
    python -m benchmarks.packing steps                                            # each of 8 ranks alone, on one GPU
    torchrun --standalone --nproc-per-node 2 -m benchmarks.packing train --heads 16 --kv-heads 4    # 1B parameters

``counts``: over many batches of documents as long as those of a training corpus, with 8K tokens a rank: the pairs of
the rank that has most over the mean, and the keys of other ranks that ranks see.
``rates``: attention, forward and backward, over all ranks. The single GPU computes the whole of the same documents, in
turns with the others. ``steps``: the passes of each rank of several, one after the other on one GPU, while nothing is
sent: what the slowest rank leaves of the rate. ``train``: tokens a second of a training step, documents new in each.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch

import distflash as df
from benchmarks import common, pictures
from benchmarks.comparison import BACKWARD, FORWARD, Comparison, kernel_of, ours, reference_for
from benchmarks.ring_steps import Alone
from benchmarks.workloads import LAYOUTS, MASKS, balance, corpus
from distflash.geometry import Geometry
from distflash.overlap import overlap

NAMES = ("zigzag", "balanced")
SINGLE = "single"


# ------------------------------------------------------------------------------------------------------------ counts
def count(options: Any) -> dict[str, Any]:
    """By ranks and layouts, over all batches: how balanced the work is, and how many keys move."""
    rows = []
    for ranks in options.ranks:
        seq_len = ranks * options.tokens_a_rank
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        least = []
        for seed in range(options.batches):
            mask = corpus(seq_len, seed)
            for name in NAMES:
                found[name].append(counted(mask, LAYOUTS[name].under(mask), seq_len, ranks))
            least.append(least_moved(documents_of(mask), ranks) / seq_len)
        rows.append({"ranks": ranks, "seq_len": seq_len, "least": mean(least)} | summary(found))
        common.say(sentence(rows[-1]))
    return {"tokens_a_rank": options.tokens_a_rank, "batches": options.batches, "rows": rows}


def counted(mask: df.Mask, layout: df.Layout, seq_len: int, ranks: int) -> dict[str, Any]:
    before = time.process_time()  # others may use the machine, too
    held = [layout.ranges(seq_len, ranks, rank) for rank in range(ranks)]
    dealt = time.process_time() - before
    ends = documents_of(mask)
    pairs, moved = zip(*(work_of(runs, ends) for runs in held), strict=True)
    tokens = [sum(map(len, runs)) for runs in held]
    return {
        "balance": max(pairs) * ranks / sum(pairs),
        "moved": sum(moved) / seq_len,
        "tokens": max(tokens) - min(tokens),
        "ms": 1e3 * dealt,
        "shares": [n * ranks / sum(pairs) for n in pairs],
    }


def work_of(runs: Sequence[range], ends: Sequence[int]) -> tuple[int, int]:
    """Pairs of a rank under causal documents, and the keys of other ranks that it sees.

    Of each document it sees the keys up to its own last token. Plans send these, and small gaps between them.
    """
    pairs, seen, own = 0, dict[int, int](), sum(map(len, runs))
    for run in runs:
        start = run.start
        while start < run.stop:
            document = bisect_right(ends, start) - 1
            first, stop = ends[document], min(run.stop, ends[document + 1])
            pairs += (stop - start) * (start - first + stop - first + 1) // 2
            seen[document] = stop - first
            start = stop
    return pairs, sum(seen.values()) - own


def documents_of(mask: Any) -> list[int]:
    return list(mask.second.cu_seqlens)


def least_moved(ends: list[int], ranks: int, limit: float = 1.05) -> float:
    """Keys that any layout moves in which no rank has more than ``limit`` times the mean of the pairs.

    Whoever holds a query of a causal document needs all keys before it. If no rank has more than c of the P pairs of a
    document of L tokens, then the last queries of at least ``j + 1`` ranks are behind ``L sqrt(1 - j c / P)``.
    """
    lengths = [stop - start for start, stop in pairwise(ends)]
    most = limit * sum(n * (n + 1) / 2 for n in lengths) / ranks
    moved = 0.0
    for n in lengths:
        pairs, held = n * (n + 1) / 2, most
        while held < pairs:
            moved += n * (1 - held / pairs) ** 0.5
            held += most
    return moved


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, batches in found.items():
        of = {key: [batch[key] for batch in batches] for key in ("balance", "moved", "tokens", "ms")}
        row[name] = {
            "balance": mean(of["balance"]),
            "worst balance": max(of["balance"]),
            "batches above 1.05": sum(x > 1.05 for x in of["balance"]),
            "moved": mean(of["moved"]),
            "tokens": max(of["tokens"]),
            "ms": median(of["ms"]),
            "shares": batches[0]["shares"],
        }
    return row


def sentence(row: dict[str, Any]) -> str:
    lines = [f"{row['ranks']} ranks, {row['seq_len']} tokens; any balanced layout moves at least {row['least']:.2f} S"]
    for name in NAMES:
        r = row[name]
        lines.append(
            f"  {name:9} slowest over mean {r['balance']:.3f}, worst batch {r['worst balance']:.3f} "
            f"({r['batches above 1.05']} above 1.05), moved {r['moved']:.3f} S, tokens differ by {r['tokens']}, "
            f"{r['ms']:.2f} ms"
        )
    lines.append(f"  moved over zigzag's {row['balanced']['moved'] / row['zigzag']['moved']:.2f}")
    return "\n".join(lines)


def draw_counts(figure: Any, record: dict[str, Any]) -> None:
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    rows, width = record["rows"], 0.35
    for n, name in enumerate(NAMES):
        at = [x + (n - 0.5) * width for x in range(len(rows))]
        left.bar(at, [row[name]["balance"] for row in rows], width, label=name.capitalize())
        right.bar(at, [row[name]["moved"] for row in rows], width, label=name.capitalize())
    right.plot(range(len(rows)), [row["least"] for row in rows], "k_", ms=30, label="least of any balanced layout")
    for axes, title in (
        (left, "pairs of the slowest rank over the mean"),
        (right, "keys received by all ranks, in sequences"),
    ):
        axes.set_xticks(range(len(rows)), [f"{row['ranks']} ranks" for row in rows])
        pictures.plain_axes(axes, title, "", f"mean of {record['batches']} batches")


# ------------------------------------------------------------------------------------------------------------- rates
def rates(options: Any, device: torch.device) -> dict[str, Any]:
    """Attention over all ranks, in both layouts, beside one GPU that computes all of the same documents."""
    rows = []
    for name in options.masks:
        mask, shape = MASKS[name](options.seq_len), common.shape_of(options, options.seq_len)
        comparison = Comparison(common.Clock(device, options.seconds), getattr(torch, options.dtype))
        alone = df.ContextParallel(df.transport.Alone())
        groups = {each: df.ContextParallel(common.ring(), LAYOUTS[each]).with_mask(mask) for each in NAMES}
        for each, cp in {SINGLE: alone, **groups}.items():
            inputs = common.random_inputs(shape, cp.seq_local(shape.S), comparison.dtype, device)
            comparison.check(each, ours(cp, shape.S).run(inputs, mask), reference_for(inputs, mask, cp, shape.S))
        total, ranks = common.flops(shape, common.pairs_of(mask, shape.S)), groups["zigzag"].world_size
        row = comparison.row(
            lambda who, which, total=total, ranks=ranks: total[which] / (1 if who == SINGLE else ranks)
        )
        plans = {each: cp.plan(mask, shape.S) for each, cp in groups.items()}
        rows.append(
            {"mask": name, "shape": str(shape), "balance": {each: balance(p.pairs) for each, p in plans.items()}, **row}
        )
        for key, rate in row["tflops"].items():
            share = rate / row["tflops"][f"{SINGLE}|{key.split('|')[1]}"]
            common.say(f"{name:12} {key:20} {rate:7.1f} TFLOP/s per GPU, {share:6.1%} of one GPU's")
    return {"seq_len": options.seq_len, "rows": rows}


def draw_rates(figure: Any, record: dict[str, Any]) -> None:
    figure.set_size_inches(10, 4)
    for axes, which in zip(figure.subplots(1, 2, sharey=True), (FORWARD, BACKWARD), strict=True):
        for n, name in enumerate((SINGLE, *NAMES)):
            values = [row["tflops"][f"{name}|{which}"] for row in record["rows"]]
            axes.bar([x + (n - 1) * 0.27 for x in range(len(values))], values, 0.27, label=pictures.word(name))
        axes.set_xticks(range(len(record["rows"])), [row["mask"] for row in record["rows"]])
        pictures.plain_axes(axes, which, "TFLOP/s per GPU (median)")
    pictures.legend_above(figure, figure.axes[0], 3)


# ------------------------------------------------------------------------------------------------------------- steps
def steps(options: Any, device: torch.device) -> dict[str, Any]:
    """Each rank's passes alone. The rate per GPU is that of all pairs in the time of the slowest rank."""
    shape, dtype = common.shape_of(options, options.seq_len), getattr(torch, options.dtype)
    clock, (ranks,) = common.Clock(device, options.seconds), options.ranks
    kernel = kernel_of(df.ContextParallel(df.transport.Alone()), common.random_inputs(shape, 16, dtype, device))
    rows = []
    for name in options.masks:
        mask = MASKS[name](options.seq_len)
        total = common.flops(shape, common.pairs_of(mask, shape.S))
        row: dict[str, Any] = {"mask": name, "shape": str(shape), "tflops": {}, "seconds": {}}
        for each in NAMES:
            geometry = Geometry.of_sequence(mask, LAYOUTS[each].under(mask), shape.S, ranks)
            taken: dict[str, list[float]] = {FORWARD: [], BACKWARD: []}
            for rank in range(ranks):
                plan = df.Ring().plan(geometry, rank).to(device)
                plan = overlap(plan, shape.G, 1, kernel.abilities(device), intra_node=True)
                timings = clock.medians(Alone(plan, shape, kernel, dtype, device).calls(each))
                for which, seconds in taken.items():
                    seconds.append(timings[f"{each}|{which}"].seconds)
            for which, seconds in taken.items():
                rate = total[which] / ranks / max(seconds) / 1e12
                row["tflops"][f"{each}|{which}"], row["seconds"][f"{each}|{which}"] = rate, seconds
                common.say(f"{name:12} {each:9} {which:9} {rate:7.1f} TFLOP/s per GPU by the slowest of {ranks} ranks")
        rows.append(row)
    return {"seq_len": shape.S, "ranks": ranks, "rows": rows}


def draw_steps(figure: Any, record: dict[str, Any]) -> None:
    figure.set_size_inches(10, 4)
    for axes, which in zip(figure.subplots(1, 2, sharey=True), (FORWARD, BACKWARD), strict=True):
        for n, name in enumerate(NAMES):
            values = [row["tflops"][f"{name}|{which}"] for row in record["rows"]]
            axes.bar([x + (n - 0.5) * 0.4 for x in range(len(values))], values, 0.4, label=name)
        axes.set_xticks(range(len(record["rows"])), [row["mask"] for row in record["rows"]])
        pictures.plain_axes(axes, f"{which}, slowest of {record['ranks']} ranks", "TFLOP/s per GPU")
    pictures.legend_above(figure, figure.axes[0], 2)


# ------------------------------------------------------------------------------------------------------------- train
class Training:
    """A decoder, and its steps on new documents each, in the layout that is asked for.

    The model needs the extra "train", which the other parts do without.
    """

    def __init__(self, options: Any, device: torch.device) -> None:
        from distflash.recipes.config import ModelConfig
        from distflash.recipes.model import Decoder

        self.options, self.device, self.seed = options, device, 0
        self.groups = {name: df.ContextParallel(common.ring(), LAYOUTS[name]) for name in NAMES}
        o = options
        config = ModelConfig(o.layers, o.heads * o.head_dim, o.heads, o.kv_heads, checkpoint_activations=True)
        torch.manual_seed(0)
        self.model = Decoder(config, self.groups["zigzag"]).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=common.is_gpu(device))
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def step(self, name: str) -> None:
        from distflash.recipes.model import VOCABULARY, loss_sum

        seq_len, self.seed = self.options.seq_len, self.seed + 1
        mask = corpus(seq_len, self.seed)
        cp = self.groups[name].with_mask(mask)
        for block in self.model.blocks:
            block.attention.cp = cp  # type: ignore[union-attr, assignment]
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(0, VOCABULARY, (1, seq_len + 1), generator=generator)
        tokens, labels = (cp.shard(tokens[:, n : n + seq_len]).to(self.device) for n in (0, 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=common.is_gpu(self.device)):
            logits = self.model(tokens, seq_len, mask)
        cp.mean(loss_sum(logits, labels), labels.numel(), reduction="sum").backward()
        for parameter in self.model.parameters():
            if cp.world_size > 1 and parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, name: str) -> float:
        before = time.perf_counter()
        self.step(name)
        if common.is_gpu(self.device):
            torch.cuda.synchronize()
        return common.worst(common.over_ranks(time.perf_counter() - before, self.device))


def train(options: Any, device: torch.device) -> dict[str, Any]:
    """Tokens a second of all ranks, both layouts in turns and on the same documents."""
    training = Training(options, device)
    taken: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(options.steps + 2):
        for name in NAMES:
            training.seed = turn
            seconds = training.seconds(name)
            if turn > 1:  # compiled, connected
                taken[name].append(seconds)
    rows = {name: options.seq_len / median(seconds) for name, seconds in taken.items()}
    for name, rate in rows.items():
        common.say(f"{name:9} {rate:10.0f} tokens a second, {training.parameters / 1e9:.2f}B parameters")
    return {"seq_len": options.seq_len, "parameters": training.parameters, "tokens a second": rows, "seconds": taken}


def draw_train(figure: Any, record: dict[str, Any]) -> None:
    axes = figure.subplots()
    axes.bar(list(record["tokens a second"]), list(record["tokens a second"].values()))
    pictures.plain_axes(
        axes, f"{record['parameters'] / 1e9:.2f}B parameters, {record['seq_len']} tokens a step", "tokens/s"
    )


# -------------------------------------------------------------------------------------------------------------------
PARTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Any, Any], None]]] = {
    "counts": (lambda options, device: count(options), draw_counts),
    "rates": (rates, draw_rates),
    "steps": (steps, draw_steps),
    "train": (train, draw_train),
}


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--ranks", type=int, nargs="+", help="counts: 2 8 64; steps: 8")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--tokens-a-rank", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, help="rates and steps: 131072; train: 65536")
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=["documents", "corpus", "full-corpus"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=22)
    common.add_sizes(parser)
    options = parser.parse_args()
    options.ranks = options.ranks or ([8] if options.part == "steps" else [2, 8, 64])
    options.seq_len = options.seq_len or (65536 if options.part == "train" else 131072)
    device = common.start("cpu" if options.part == "counts" else options.device)
    measure, draw = PARTS[options.part]
    record = measure(options, device)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    name = f"packing-{options.part}" + (f"-{ranks}" if options.part in ("rates", "train") else "")
    common.save(name, options.out, record, draw)
    common.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
