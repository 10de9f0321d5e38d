"""What does spreading a sequence over GPUs cost? TFLOP/s per GPU of the ring, and its share of the single-GPU rate.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring --peers
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring --seq-lens 1048576
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ring --mask window --layout contiguous --seq-lens 131072

The single-GPU rate is taken in the same run, in turns with the ring, on every GPU: the same kernel and mask on a
sequence so long that one GPU has as much to do as each has in the ring. Both times are the slowest GPU's: GPUs of one
host differ by a percent or two, which the ring has to wait for and cannot help. The times of all are in the record.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import distflash as df
from benchmarks import common, truth
from benchmarks.common import Shape

Calls = dict[str, Callable[[], object]]
LAYOUTS: dict[str, df.Layout] = {"zigzag": df.Zigzag(), "contiguous": df.Contiguous(), "striped": df.Striped()}


def documents(seq_len: int) -> df.Mask:
    """Causal within packed documents whose lengths are drawn log-uniformly from 256 to 32K."""
    generator, ends = random.Random(0), [0]
    while ends[-1] < seq_len:
        ends.append(min(seq_len, ends[-1] + int(256 * 2 ** generator.uniform(0, 7))))
    return df.Causal() & df.Documents(ends)


MASKS: dict[str, Callable[[int], df.Mask]] = {
    "causal": lambda seq_len: df.Causal(),
    "full": lambda seq_len: df.Full(),
    "window": lambda seq_len: df.Window(min(4096, seq_len) - 1, 0),
    "documents": documents,
}


def single_length(mask: str, seq_len: int, ranks: int, longest: int) -> int:
    """A length at which one GPU has the work of one rank of the ring, in whole tiles: pairs grow as S^2, or as S."""
    share = ranks**0.5 if mask in ("causal", "full") else ranks
    return min(longest, max(256, round(seq_len / share / 256) * 256))


def calls_of(name: str, attend: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> tuple[Calls, dict[str, Tensor]]:
    """Forward and backward of ``attend()``, run once; and what they gave."""
    q, k, v, dout = inputs
    out = attend()
    grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    calls: Calls = {
        f"{name}|forward": attend,
        f"{name}|backward": lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
    }
    return calls, dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))


class Bench:
    """One mask and layout over all ranks."""

    def __init__(self, options: Any, device: torch.device) -> None:
        self.options, self.device = options, device
        self.dtype = getattr(torch, options.dtype)
        self.alone = df.ContextParallel(df.transport.Alone())
        self.cp = df.ContextParallel(common.ring(), layout=LAYOUTS[options.layout], schedule=df.Ring())
        self.clock = common.Clock(device, options.seconds, lambda x: max(common.over_ranks(x, device)))

    def row(self, seq_len: int) -> dict[str, Any]:
        o = self.options
        shape = Shape(1, seq_len, o.heads, o.kv_heads, o.head_dim, o.head_dim)
        alone_shape = replace(shape, S=single_length(o.mask, seq_len, self.cp.world_size, o.single_max))
        row: dict[str, Any] = {"shape": str(shape), "seq_len": seq_len, "single": str(alone_shape), "errors": {}}
        row["left_out"] = {}
        with ExitStack() as stack:
            calls, right = self._ours(shape, row)
            calls |= self._single(alone_shape, row)
            if o.peers:
                calls |= self._peers(shape, row, right, stack)
            timings = self.clock.medians(calls)
        row["timings"] = {name: asdict(t) for name, t in timings.items()}
        row["ranks"] = {name: common.over_ranks(t.seconds, self.device) for name, t in timings.items()}
        self._rates(row, shape, alone_shape)
        return row

    def _ours(self, shape: Shape, row: dict[str, Any]) -> tuple[Calls, tuple[Any, Any]]:
        mask = MASKS[self.options.mask](shape.S)
        inputs = common.random_inputs(shape, self.cp.seq_local(shape.S), self.dtype, self.device)
        q, k, v, dout = inputs
        with torch.no_grad():
            out, lse = df.attention(q, k, v, mask=mask, cp=self.cp, seq_len=shape.S, return_lse=True)
        right = truth.sample(q, k, v, dout, out, lse, mask=mask, cp=self.cp, seq_len=shape.S)
        del out, lse
        calls, results = calls_of("ring", lambda: df.attention(q, k, v, mask=mask, cp=self.cp, seq_len=shape.S), inputs)
        plan = self.cp.plan(mask, shape.S, self.device)
        row |= {"hops": plan.hops, "pairs": plan.pairs.tolist()}
        return self._checked("ring", calls, right.errors(**results), row), (inputs, right)

    def _single(self, shape: Shape, row: dict[str, Any]) -> Calls:
        mask = MASKS[self.options.mask](shape.S)
        inputs = common.random_inputs(shape, shape.S, self.dtype, self.device)
        q, k, v, dout = inputs
        with torch.no_grad():
            out, lse = df.attention(q, k, v, mask=mask, return_lse=True)
        right = truth.sample(q, k, v, dout, out, lse, mask=mask, cp=self.alone, seq_len=shape.S)
        calls, results = calls_of("single", lambda: df.attention(q, k, v, mask=mask), inputs)
        errors = right.errors(**results)
        # One decision on all ranks, or they would time different things.
        worst = {name: max(common.over_ranks(error, self.device)) for name, error in errors.items()}
        return self._checked("single", calls, worst, row)

    def _peers(self, shape: Shape, row: dict[str, Any], right: tuple[Any, Any], stack: ExitStack) -> Calls:
        """PyTorch's own context parallelism: all-gather of K and V, cuDNN's kernels, zigzag shards as ours."""
        if self.options.mask != "causal" or self.options.layout != "zigzag":
            row["left_out"]["torch"] = "takes causal masks on its own zigzag layout only"
            return {}
        inputs, sampled = right
        group = shape.H // shape.G
        for name, repeats in (("torch", 1), ("torch, K and V repeated", group)):
            try:
                with ExitStack() as attempt:
                    attempt.enter_context(torch_context_parallel(shape.S, self.device))
                    calls, results = torch_calls(name, inputs, repeats)
                    stack.push(attempt.pop_all())  # it worked: stay inside until the timing is done
            except Exception as error:
                row["left_out"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                continue
            return self._checked(name, calls, sampled.errors(**results), row)
        return {}

    def _checked(self, name: str, calls: Calls, errors: dict[str, float], row: dict[str, Any]) -> Calls:
        row["errors"][name] = errors
        if truth.wrong(errors, self.dtype):
            row["left_out"][name] = "wrong result"
            return {}
        return calls

    def _rates(self, row: dict[str, Any], shape: Shape, alone: Shape) -> None:
        """TFLOP/s per GPU from the slowest of them, and the ratios."""
        build, ranks = MASKS[self.options.mask], self.cp.world_size
        work = {k: x / ranks for k, x in common.flops(shape, common.pairs_of(build(shape.S), shape.S)).items()}
        single = common.flops(alone, common.pairs_of(build(alone.S), alone.S))
        row["tflops"], row["share"] = {}, {}
        for key, times in row["ranks"].items():
            name, direction = key.split("|")
            flops = single if name == "single" else work
            row["tflops"][key] = flops[direction] / max(times) / 1e12
        for key, rate in row["tflops"].items():
            name, direction = key.split("|")
            base = row["tflops"].get(f"single|{direction}")
            if name != "single" and base:
                row["share"][key] = rate / base


def torch_calls(name: str, inputs: tuple[Tensor, ...], repeats: int) -> tuple[Calls, dict[str, Tensor]]:
    """SDPA as it is in this context, on ``[B, H, T, D]``; every key head ``repeats`` times, if not by its own GQA."""
    q, k, v, dout = (x.detach().transpose(1, 2).contiguous() for x in inputs)
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            # By name from the module: context_parallel replaces it there.
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )

    calls, results = calls_of(name, attend, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout))
    tokens_first = {n: x.transpose(1, 2) for n, x in results.items()}
    for n in ("dk", "dv"):
        tokens_first[n] = tokens_first[n].float().unflatten(2, (-1, repeats)).sum(3)
    return calls, tokens_first


@contextmanager
def torch_context_parallel(seq_len: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's scaled_dot_product_attention is its context-parallel one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method("allgather")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # It insists on a buffer to shard; ours are sharded already.
    nothing = torch.zeros(1, seq_len, dtype=torch.int8, device=device)
    with context_parallel(mesh, buffers=[nothing], buffer_seq_dims=[1], no_restore_buffers={nothing}):
        yield


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['shape']}, {row['hops']} hops (single GPU: {row['single']})")
    for key, rate in row["tflops"].items():
        share = f"{row['share'][key]:6.1%} of single" if key in row["share"] else ""
        time = row["timings"][key]
        common.say(
            f"  {key:32} {rate:7.1f} TFLOP/s per GPU  {share:18} {1e3 * time['seconds']:.2f} ms"
            f" host {1e3 * time['host']:.2f} ms"
        )
    common.say("  errors " + ", ".join(f"{n} {max(e.values()):.1e}" for n, e in row["errors"].items()))
    for name, reason in row["left_out"].items():
        common.say(f"  {name} left out: {reason}")


def draw(figure: Any, rows: list[dict[str, Any]], title: str) -> None:
    figure.set_size_inches(10, 4.5)
    names = list(dict.fromkeys(key.split("|")[0] for row in rows for key in row["tflops"]))
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for name in names:
            points = [(r["seq_len"], r["tflops"].get(f"{name}|{direction}")) for r in rows]
            points = [p for p in points if p[1]]
            style = "--" if name == "single" else "-"
            axes.plot([x for x, _ in points], [y for _, y in points], style, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        lengths = [r["seq_len"] for r in rows]
        axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
        common.plain_axes(axes, f"{title}, {direction}", "TFLOP/s per GPU (median)", "global tokens S")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[16384, 65536, 131072])
    parser.add_argument("--mask", choices=list(MASKS), default="causal")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="zigzag")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--single-max", type=int, default=131072, help="longest sequence on a single GPU")
    parser.add_argument("--peers", action="store_true", help="torch's context_parallel besides")
    parser.add_argument("--name", help="of the files; by default ring-<mask>")
    options = parser.parse_args()
    device = common.start(options.device)
    bench = Bench(options, device)
    name = options.name or f"ring-{options.mask}"
    title = f"{options.mask}, {options.layout}, {bench.cp.world_size} ranks"
    rows = []
    for seq_len in options.seq_lens:
        rows.append(bench.row(seq_len))
        report(rows[-1])
        record = {"dtype": options.dtype, "mask": options.mask, "layout": options.layout, "rows": rows}
        common.save(name, options.out, record, lambda f: draw(f, rows, title))
    common.finish()
    return int(any("ring" in row["left_out"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
