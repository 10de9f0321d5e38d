"""What does chunked prefill cost, compared with one call of the whole length?

    python -m benchmarks.prefill                                        # one GPU
    torchrun --standalone --nproc-per-node 2 -m benchmarks.prefill      # two
    python -m benchmarks.prefill --alone 2                              # each of two ranks by itself, nothing is sent

Causal, some layers of attention, each with a cache of its own; the plan of a chunk is made once for all of them.
``share`` is the time of one call a layer over that of all chunks. Both are timed in turns in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import distflash as df
from benchmarks import common, pictures

WHOLE = "one call"


class Prompt:
    """A prompt that one rank has its tokens of, as a whole and in chunks."""

    def __init__(self, cp: df.ContextParallel, options: Any, device: torch.device) -> None:
        self.cp, self.options, self.device = cp, options, device
        shape = common.shape_of(options, options.seq_len)
        self.dtype = getattr(torch, options.dtype)
        inputs = common.random_inputs(shape, cp.seq_local(shape.S), self.dtype, device)
        self.q, self.k, self.v = (x.detach() for x in inputs[:3])
        sizes = dict(batch=1, kv_heads=shape.G, d_qk=shape.D, d_v=shape.V, capacity=shape.S)
        self.caches = [df.Cache(cp, **sizes, dtype=self.dtype, device=device) for _ in range(options.layers)]

    def whole(self) -> None:
        with torch.no_grad():
            for _ in self.caches:
                df.attention(self.q, self.k, self.v, mask=df.Causal(), cp=self.cp, seq_len=self.options.seq_len)

    def chunks(self, size: int) -> Callable[[], None]:
        """Of ``size`` tokens. Which of the random tokens they are does not matter to the time."""

        def run() -> None:
            for cache in self.caches:
                cache.truncate(0)
            for start in range(0, self.options.seq_len, size):
                tokens = min(size, self.options.seq_len - start)
                local = self.cp.seq_local(tokens)
                some = [x[:, :local] for x in (self.q, self.k, self.v)]
                with torch.no_grad():
                    for cache in self.caches:
                        df.attention(*some, mask=df.Causal(), cp=self.cp, cache=cache, seq_len=tokens)

        return run


def measure(options: Any, device: torch.device) -> dict[str, Any]:
    clock, cases = common.Clock(device, options.seconds), {}
    transports = (
        {
            f"rank {rank} of {options.alone}": df.transport.Silent(rank, options.alone, device)
            for rank in range(options.alone)
        }
        if options.alone
        else {"all ranks": common.ring()}
    )
    for name, transport in transports.items():
        prompt = Prompt(df.ContextParallel(transport), options, device)
        calls: dict[str, Callable[[], object]] = {WHOLE: prompt.whole}
        calls |= {f"chunks of {size}": prompt.chunks(size) for size in options.chunks}
        for call in calls.values():
            call()
        timings = clock.medians(calls)
        seconds = {each: max(common.over_ranks(t.seconds, device)) for each, t in timings.items()}
        cases[name] = {
            each: {"seconds": s, "host": timings[each].host, "share": seconds[WHOLE] / s} for each, s in seconds.items()
        }
    shape = common.shape_of(options, options.seq_len)
    return {
        "shape": str(shape),
        "layers": options.layers,
        "ranks": options.alone or common.ring().world_size,
        "cases": cases,
    }


def report(record: dict[str, Any]) -> None:
    common.say(f"{record['shape']}, causal, {record['layers']} layers, {record['ranks']} ranks")
    for name, case in record["cases"].items():
        for each, found in case.items():
            common.say(
                f"  {name:16} {each:18} {found['seconds'] * 1e3:9.2f} ms (host {found['host'] * 1e3:8.2f} ms) "
                f"{found['share']:6.1%} of one call"
            )


def draw(figure: Any, record: dict[str, Any]) -> None:
    figure.set_size_inches(8, 4)
    axes, names = figure.subplots(), list(record["cases"])
    for n, name in enumerate(names):
        case = {each: found for each, found in record["cases"][name].items() if each != WHOLE}
        places = [at + 0.8 * (n + 0.5) / len(names) - 0.4 for at in range(len(case))]
        bars = axes.barh(places, [found["share"] for found in case.values()], 0.75 / len(names), label=name)
        axes.bar_label(bars, fmt=" {:.0%}", fontsize=9)
        axes.set_yticks(range(len(case)), list(case))
    axes.set_xlim(0, 1.1)
    axes.invert_yaxis()
    title = f"{pictures.shape(record['shape'])}, {record['ranks']} rank" + "s" * (record["ranks"] > 1)
    pictures.plain_axes(axes, title, "", "share of the rate of one call")
    axes.grid(False)
    axes.get_legend().remove()
    if len(names) > 1:
        pictures.legend_above(figure, axes, len(names))


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--alone", type=int, default=0, help="so many ranks, each by itself on this GPU")
    common.add_sizes(parser)
    options = parser.parse_args()
    record = measure(options, common.start(options.device))
    report(record)
    kind = "-alone" if options.alone else ""
    common.save(f"prefill-{record['ranks']}{kind}", options.out, record, draw)
    common.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
