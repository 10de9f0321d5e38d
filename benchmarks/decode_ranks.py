"""How long does a decoding step over several GPUs take, compared with cuDNN on one?

    torchrun --standalone --nproc-per-node 2 -m benchmarks.decode_ranks

One new token over a cache that the ranks share, through `df.decode`, as a CUDA graph: half of the keys for each of two
ranks, the exchange of partial results, and the merge. cuDNN has all keys on one GPU, up to ``--peer-below`` keys.
Checked against a float64 softmax over all keys.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import distflash as df
from benchmarks import common, pictures
from benchmarks.decode import Exact, as_graph, sdpa

CHUNK = 131072
STEPS = 4096
OURS, PEER = "distflash", "cudnn on one GPU"


def new_tokens(options: Any, tokens: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of so many tokens, the same on every rank."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = options.heads, options.kv_heads, options.kv_heads
    sizes = [(1, tokens, h, options.head_dim) for h in heads]
    dtype = getattr(torch, options.dtype)
    q, k, v = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes)
    return q, k, v


def filled(cp: df.ContextParallel, options: Any, seq_len: int, device: torch.device) -> df.Cache:
    """A cache of random keys. Their queries have one head a key head: what they see does not matter."""
    sizes = dict(batch=1, kv_heads=options.kv_heads, d_qk=options.head_dim, capacity=seq_len + STEPS)
    cache = df.Cache(cp, **sizes, dtype=getattr(torch, options.dtype), device=device)
    for start in range(0, seq_len, CHUNK):
        count = min(CHUNK, seq_len - start)
        _, k, v = (cp.shard(x) for x in new_tokens(options, count, device, 1 + start))
        with torch.no_grad():
            df.attention(torch.zeros_like(k), k, v, mask=df.Window(0, 0), cp=cp, cache=cache, seq_len=count)
    return cache


def row_of(seq_len: int, cp: df.ContextParallel, options: Any, device: torch.device) -> dict[str, Any]:
    q, k, v = new_tokens(options, 1, device, 0)
    cache = filled(cp, options, seq_len, device)
    out = df.decode(q, k, v, cache=cache, mask=df.Causal()).clone()
    calls = {OURS: as_graph(lambda: df.decode(q, k, v, cache=cache, mask=df.Causal()))}
    error = None
    if seq_len <= options.peer_below:
        parts = [new_tokens(options, min(CHUNK, seq_len - s), device, 1 + s) for s in range(0, seq_len, CHUNK)]
        keys, values = (torch.cat([p[n] for p in parts] + [new], 1) for n, new in ((1, k), (2, v)))
        error = Exact.of(q, keys, values).errors(out)["out"]
        heads_first = [x.transpose(1, 2).contiguous() for x in (q, keys, values)]
        attend = sdpa(SDPBackend.CUDNN_ATTENTION)
        attend(*heads_first)
        calls[PEER] = as_graph(lambda: attend(*heads_first))
    timings = common.Clock(device, options.seconds).medians(calls)
    seconds = {name: max(common.over_ranks(t.seconds, device)) for name, t in timings.items()}
    ratio = seconds[OURS] / seconds[PEER] if PEER in seconds else None
    return {"S": seq_len, "seconds": seconds, "ratio": ratio, "error": error, "bytes_of_cache": cache.nbytes}


def report(row: dict[str, Any]) -> None:
    words = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in row["seconds"].items())
    compared = "" if row["ratio"] is None else f", ratio {row['ratio']:.3f}, error {row['error']:.1e}"
    common.say(f"S {row['S']}: {words}{compared}")


def draw(figure: Any, record: dict[str, Any]) -> None:
    figure.set_size_inches(8, 4.5)
    rows, ranks = record["rows"], record["ranks"]
    axes = figure.subplots()
    for name in (OURS, PEER):
        points = [(row["S"], 1e6 * row["seconds"][name]) for row in rows if name in row["seconds"]]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                label=f"{name} on {ranks} GPUs" if name == OURS else pictures.word(name),
            )
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    pictures.log_lengths(axes, [row["S"] for row in rows])
    pictures.plain_axes(axes, "One new token", "microseconds a step (median)", "tokens in the cache")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[16384, 131072, 1048576])
    parser.add_argument("--peer-below", type=int, default=131072, help="largest length at which cuDNN is timed")
    common.add_sizes(parser)
    options = parser.parse_args()
    device = common.start(options.device)
    cp = df.ContextParallel(common.ring())
    rows: list[dict[str, Any]] = []
    for seq_len in options.seq_lens:
        rows.append(row_of(seq_len, cp, options, device))
        report(rows[-1])
    record = {"ranks": cp.world_size, "dtype": options.dtype, "rows": rows}
    common.save(f"decode-{cp.world_size}", options.out, record, draw)
    common.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
