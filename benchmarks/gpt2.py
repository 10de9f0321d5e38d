"""How much faster is the attention of GPT-2 medium than plain PyTorch: matmul, scale, mask, softmax, matmul?

    python -m benchmarks.gpt2                        # 16 heads of 64, 1024 tokens, batch 32, fp16, causal
    python -m benchmarks.gpt2 --softmax float32      # plain attention whose softmax is taken in float32

Plain attention is what a GPT-2 without fused kernels runs, dropout left out: each step is an eager operation on tensors
[batch, heads, S, head dim] that are contiguous, and the whole matrix of scores is in memory, in fp16. PyTorch computes
an fp16 softmax in float32 inside its kernel and rounds once; with --softmax float32 the scores are converted before and
the probabilities after, as some implementations do. Everybody gets contiguous tensors as they like them best.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import distflash as df
from benchmarks import common, pictures
from benchmarks.common import Shape
from benchmarks.comparison import BOTH, FORWARD, Candidate, Comparison, kernel_of, ours, reference_for
from benchmarks.peers import local

OURS, PLAIN = "distflash", "plain PyTorch"
MASK = df.Causal()
# Required and desired speedup over plain PyTorch on an H200.
WANTED = {FORWARD: (15, 20), BOTH: (9, 12)}


def plain(softmax: torch.dtype) -> Candidate:
    """Attention by the definition, one eager operation a step."""

    @lru_cache(1)
    def forbidden(length: int, device: torch.device) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        local.require(mask, df.Causal)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(forbidden(q.shape[2], q.device), -torch.inf)
        return torch.softmax(scores, -1, dtype=softmax).to(q.dtype) @ v

    return Candidate(attend, heads_first=True)


def measure(shape: Shape, dtype: torch.dtype, softmax: torch.dtype, clock: common.Clock) -> dict[str, Any]:
    alone = df.ContextParallel(df.transport.Alone())
    inputs = common.random_inputs(shape, shape.S, dtype, clock.device)
    right = reference_for(inputs, MASK, alone, shape.S)
    comparison = Comparison(clock, dtype, passes=(FORWARD, BOTH))
    comparison.enter(OURS, lambda: ours(alone, shape.S).run(inputs, MASK), right)
    comparison.enter(PLAIN, lambda: plain(softmax).run(inputs, MASK), right)
    for name in (local.FLASH, local.CUDNN, local.FLASH4):
        comparison.enter(name, lambda make=local.MAKERS[name]: make().run(inputs, MASK), right)
    flops = common.flops(shape, common.pairs_of(MASK, shape.S))
    work = {FORWARD: flops["forward"], BOTH: sum(flops.values())}
    row = comparison.row(lambda name, which: work[which])
    row |= {"shape": str(shape), "dtype": str(dtype), "softmax": str(softmax)}
    row |= {"kernel": repr(kernel_of(alone, inputs)), "wanted": WANTED}
    return row | {"speedup": speedups(row["tflops"])}


def speedups(tflops: dict[str, float]) -> dict[str, float]:
    """Each candidate's rate over that of plain attention, by pass."""
    found = {}
    for key, rate in tflops.items():
        base = tflops.get(f"{PLAIN}|{key.split('|')[1]}")
        if base is not None:
            found[key] = rate / base
    return found


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']} {row['dtype']}, softmax of plain attention in {row['softmax']}, {row['kernel']}")
    for key, time in row["timings"].items():
        name, which = key.split("|")
        factor = f"{row['speedup'][key]:6.2f} x plain" if key in row["speedup"] else ""
        worst = max(row["errors"][name].values())
        common.say(
            f"  {name:14} {which:20} {1e3 * time['seconds']:8.3f} ms   {row['tflops'][key]:6.1f} TFLOP/s   {factor}"
            f"   error {worst:.1e}"
        )
    for which, (least, aim) in WANTED.items():
        if f"{OURS}|{which}" in row["speedup"]:
            factor = row["speedup"][f"{OURS}|{which}"]
            common.say(f"  {which}: {factor:.2f} x; at least {least} x wanted on an H200, the aim is {aim} x")
    for name, reason in row["left_out"].items():
        common.say(f"  {name:14} left out: {reason}")


def draw(figure: Any, row: dict[str, Any]) -> None:
    """Lines: what was asked for, at least (dashed) and at best (dotted)."""
    figure.set_size_inches(9, 4)
    for axes, which in zip(figure.subplots(1, 2), (FORWARD, BOTH), strict=True):
        keys = [key for key in row["speedup"] if key.endswith(f"|{which}")]
        bars = axes.bar(range(len(keys)), [row["speedup"][key] for key in keys])
        axes.bar_label(bars, [f"{row['speedup'][key]:.1f}x" for key in keys], fontsize=8)
        for wanted, style in zip(WANTED[which], ("--", ":"), strict=True):
            axes.axhline(wanted, linestyle=style, linewidth=1, color="#888888")
        axes.set_xticks(
            range(len(keys)), [pictures.word(key.split("|")[0]).replace(" (", "\n(") for key in keys], fontsize=8
        )
        pictures.plain_axes(axes, f"GPT-2 medium attention, {which}", "times as fast as plain PyTorch")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--softmax", choices=("float16", "bfloat16", "float32"), help="by default as --dtype")
    options = parser.parse_args()
    device = common.start(options.device)
    dtype, softmax = (getattr(torch, name) for name in (options.dtype, options.softmax or options.dtype))
    shape = Shape(options.batch, options.seq_len, options.heads, options.heads, options.head_dim, options.head_dim)
    row = measure(shape, dtype, softmax, common.Clock(device, options.seconds))
    report(row)
    common.save("gpt2", options.out, row, draw)
    return int(any(name in row["left_out"] for name in (OURS, PLAIN)))


if __name__ == "__main__":
    sys.exit(main())
