"""How fast is one GPU's attention, forward and backward, beside its peers?

    python -m benchmarks.kernels --quick          # three shapes, half a minute
    python -m benchmarks.kernels                  # all shapes
    python -m benchmarks.kernels --flex --more    # and FlexAttention (compiles for a while), head dims 256 and 192/128

Peers that do not import, or do not take a shape, are left out with the reason. TFLOP/s count allowed pairs only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import distflash as df
from benchmarks import common, truth
from benchmarks.common import Shape
from distflash.kernels.base import Hop, Kernel, KeyGradient, QueryGradient, Scores
from distflash.partial import Partial

OURS = "distflash"
MASKS: dict[str, df.Mask] = {"full": df.Full(), "causal": df.Causal()}
REQUIRED = [
    (Shape(1, 16384, 16, 16, 128, 128), "full"),
    (Shape(1, 16384, 16, 16, 128, 128), "causal"),
    (Shape(1, 16384, 32, 32, 64, 64), "full"),
]
USUAL = [
    *REQUIRED,
    (Shape(1, 16384, 32, 32, 64, 64), "causal"),
    *((Shape(8, 2048, 16, 16, 128, 128), mask) for mask in MASKS),
    *((Shape(8, 2048, 32, 32, 64, 64), mask) for mask in MASKS),
    *((Shape(1, 32768, 32, 8, 128, 128), mask) for mask in MASKS),
]
MORE = [
    *((Shape(1, 16384, 8, 8, 256, 256), mask) for mask in MASKS),
    *((Shape(1, 16384, 16, 16, 192, 128), mask) for mask in MASKS),
]


@dataclass(frozen=True)
class Peer:
    """attend(q, k, v, mask name) -> out, with tensors [B, H, S, D] if heads_first, else [B, S, H, D]."""

    attend: Callable[[Tensor, Tensor, Tensor, str], Tensor]
    heads_first: bool = False

    def native(self, x: Tensor) -> Tensor:
        """A tensor ``[B, S, H, D]`` as the peer likes it best."""
        return (x.transpose(1, 2) if self.heads_first else x).detach().contiguous()

    def ours(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.heads_first else x


def _sdpa(backend: SDPBackend) -> Peer:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=mask == "causal", enable_gqa=q.shape[1] != k.shape[1]
            )

    return Peer(attend, heads_first=True)


def _flex() -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    @cache
    def block_mask(length: int, device: torch.device) -> Any:
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
        blocks = block_mask(q.shape[2], q.device) if mask == "causal" else None
        return compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    return Peer(attend, heads_first=True)


def _flash_attention_4() -> Peer:
    from flash_attn.cute import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
        out = flash_attn_func(q, k, v, causal=mask == "causal")
        return out[0] if isinstance(out, tuple) else out

    return Peer(attend)


def peers(flex: bool) -> dict[str, Peer]:
    """Ours first, then whoever imports."""
    found = {OURS: Peer(lambda q, k, v, mask: df.attention(q, k, v, mask=MASKS[mask]))}
    makers: dict[str, Callable[[], Peer]] = {
        "SDPA flash": lambda: _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": lambda: _sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash-attn-4": _flash_attention_4,
    }
    if flex:
        makers["FlexAttention"] = _flex
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            common.say(f"{name}: left out, {type(error).__name__}: {error}")
    return found


@dataclass(frozen=True)
class Prepared:
    """One peer's calls for one shape, checked."""

    calls: dict[str, Callable[[], object]]
    errors: dict[str, float]


def prepare(peer: Peer, inputs: tuple[Tensor, ...], mask: str, right: truth.Truth) -> Prepared:
    q, k, v, dout = (peer.native(x) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out = peer.attend(q, k, v, mask)
    grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    results = dict(zip(("out", "dq", "dk", "dv"), map(peer.ours, (out, *grads)), strict=True))
    calls = {
        "forward": lambda: peer.attend(q, k, v, mask),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
    }
    return Prepared(calls, right.errors(**results))


def bare(inputs: tuple[Tensor, ...], mask: df.Mask, clock: common.Clock) -> dict[str, common.Timing]:
    """Our kernels by themselves: no autograd, no engine, buffers there already."""
    q, k, v, dout = (x.detach() for x in inputs)
    rows = df.ContextParallel(df.transport.Alone()).plan(mask, q.shape[1], q.device).intervals[0]
    kernel: Kernel = df.kernels.Triton() if q.is_cuda else df.kernels.Reference()
    scores, only = Scores(q.shape[-1] ** -0.5), Hop(first=True, last=True)
    into = Partial.empty(q, v.shape[-1], hops=1)

    def forward() -> None:
        kernel.forward(q, k, v, rows, scores, only, into)

    forward()
    saved = kernel.save(q, into.final, into.lse, dout, None)
    dq, dkv = QueryGradient(torch.empty_like(q), None), KeyGradient(torch.empty_like(k), torch.empty_like(v))

    def backward() -> None:
        kernel.backward(saved, k, v, rows, scores, only, dq, dkv, lambda: None)

    calls = {"forward": forward, "save": lambda: kernel.save(q, into.final, into.lse, dout, None), "backward": backward}
    return clock.medians(calls)


def measure(shape: Shape, mask: str, found: dict[str, Peer], dtype: torch.dtype, clock: common.Clock) -> dict[str, Any]:
    """All peers on one shape, in turns."""
    alone = df.ContextParallel(df.transport.Alone())
    inputs = common.random_inputs(shape, shape.S, dtype, clock.device)
    q, k, v, dout = inputs
    with torch.no_grad():
        out, lse = df.attention(q, k, v, mask=MASKS[mask], return_lse=True)
    right = truth.sample(q, k, v, dout, out, lse, mask=MASKS[mask], cp=alone, seq_len=shape.S)
    row: dict[str, Any] = {"shape": str(shape), "mask": mask, **asdict(shape), "errors": {}, "left_out": {}}
    calls: dict[str, Callable[[], object]] = {}
    for name, peer in found.items():
        try:
            prepared = prepare(peer, inputs, mask, right)
        except Exception as error:
            row["left_out"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        row["errors"][name] = prepared.errors
        if truth.wrong(prepared.errors, dtype):
            row["left_out"][name] = "wrong result"
            continue
        calls |= {f"{name}|{direction}": call for direction, call in prepared.calls.items()}
    timings = clock.medians(calls)
    work = common.flops(shape, common.pairs_of(MASKS[mask], shape.S))
    row["timings"] = {name: asdict(t) for name, t in timings.items()}
    row["tflops"] = {name: work[name.split("|")[1]] / t.seconds / 1e12 for name, t in timings.items()}
    if OURS not in row["left_out"]:
        row["bare"] = {name: asdict(t) for name, t in bare(inputs, MASKS[mask], clock).items()}
    row["ratios"] = _ratios(row["tflops"])
    return row


def _ratios(tflops: dict[str, float]) -> dict[str, float]:
    """Ours over each peer's, by direction."""
    ratios = {}
    for name, rate in tflops.items():
        peer, direction = name.split("|")
        ours = tflops.get(f"{OURS}|{direction}")
        if peer != OURS and ours is not None:
            ratios[name] = ours / rate
    return ratios


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']} {row['mask']}")
    for name in row["errors"]:
        if name in row["left_out"]:
            continue
        forward, backward = (row["tflops"][f"{name}|{direction}"] for direction in ("forward", "backward"))
        host = 1e6 * row["timings"][f"{name}|forward"]["host"]
        worst = max(row["errors"][name].values())
        common.say(f"  {name:14} {forward:7.1f} / {backward:7.1f} TFLOP/s   error {worst:.1e}   host {host:.0f} us")
    for name, time in row.get("bare", {}).items():
        common.say(f"    bare {name:9} {1e3 * time['seconds']:.3f} ms")
    for name, reason in row["left_out"].items():
        common.say(f"  {name:14} left out: {reason}")


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    figure.set_size_inches(max(8, 1.6 * len(rows) + 3), 8)
    names = list(dict.fromkeys(key.split("|")[0] for row in rows for key in row["tflops"]))
    for axes, direction in zip(figure.subplots(2, 1), ("forward", "backward"), strict=True):
        for n, name in enumerate(names):
            rates = [row["tflops"].get(f"{name}|{direction}", 0.0) for row in rows]
            places = [i + 0.8 * (n + 0.5) / len(names) - 0.4 for i in range(len(rows))]
            bars = axes.bar(places, rates, 0.8 / len(names), label=name)
            axes.bar_label(bars, [f"{rate:.0f}" if rate else "" for rate in rates], fontsize=6)
        axes.set_xticks(range(len(rows)), [f"{row['shape']}\n{row['mask']}" for row in rows], fontsize=7)
        common.plain_axes(axes, f"One GPU, {direction}", "TFLOP/s (median)")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    parser.add_argument("--more", action="store_true", help="head dims 256 and 192/128 besides")
    parser.add_argument("--flex", action="store_true", help="FlexAttention besides")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="256 tokens: tries the benchmark itself out")
    options = parser.parse_args()
    device = common.start(options.device)
    clock = common.Clock(device, options.seconds)
    found = peers(options.flex)
    dtype = getattr(torch, options.dtype)
    rows = []
    for shape, mask in (REQUIRED if options.quick else USUAL) + (MORE if options.more else []):
        rows.append(measure(replace(shape, S=256) if options.tiny else shape, mask, found, dtype, clock))
        report(rows[-1])
        common.save("kernels", options.out, {"dtype": options.dtype, "rows": rows}, lambda f: draw(f, rows))
    return int(any(OURS in row["left_out"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
