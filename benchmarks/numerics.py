"""The error of ring attention against float64, for several numbers of ranks.

    python -m benchmarks.numerics                 # plain torch on the CPU, ranks simulated in one process
    python -m benchmarks.numerics --device cuda   # the Triton kernel, ranks simulated on one GPU

Prints a markdown table: relative (Frobenius) errors of out, dq, dk and dv, causal, zigzag. The last row of each dtype
is dense attention in plain torch with every tensor in that dtype, the whole matrix at once.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import distflash as df
from benchmarks import common, pictures
from benchmarks.common import Shape
from distflash import engine
from distflash.kernels.base import Kernel, Scores
from distflash.overlap import overlap
from distflash.transport import SimulatedTransport, Simulator

NAMES = ("out", "dq", "dk", "dv")
MASK = df.Causal()
DENSE = "dense"


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv by the definition, in the dtype of the inputs."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    group, positions = q.shape[2] // k.shape[2], torch.arange(q.shape[1], device=q.device)
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    s = q.transpose(1, 2) @ keys.mT * q.shape[-1] ** -0.5
    p = torch.softmax(s.masked_fill(~MASK.materialize(positions, positions), -torch.inf), -1)
    out = (p @ values).transpose(1, 2)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def ring(inputs: tuple[Tensor, ...], ranks: int, kernel: Kernel) -> tuple[Tensor, ...]:
    """The same by a simulated ring.

    The engine is called without autograd, whose one thread a device cannot run the backward passes of ranks that wait
    for one another.
    """
    seq_len = inputs[0].shape[1]

    def work(transport: SimulatedTransport) -> tuple[Tensor, ...]:
        cp = df.ContextParallel(transport, layout=df.Zigzag(), schedule=df.Ring())
        q, k, v, dout = (cp.shard(x) for x in inputs)
        plan = overlap(
            cp.plan(MASK, seq_len, q.device), k.shape[2], q.shape[0], kernel.abilities(q.device), transport.intra_node
        )
        call = engine.Call(plan, transport, kernel, Scores(q.shape[-1] ** -0.5))
        out, lse, _ = engine.forward(q, k, v, call)
        dq, dk, dv, _ = engine.backward(dout, None, q, k, v, out, lse, call)
        return out, dq, dk, dv

    parts = Simulator(ranks).run(work)
    return tuple(_whole([part[n] for part in parts], seq_len) for n in range(len(NAMES)))


def _whole(parts: list[Tensor], seq_len: int) -> Tensor:
    order = torch.cat([df.Zigzag().positions(seq_len, len(parts), rank) for rank in range(len(parts))])
    return torch.cat(parts, 1)[:, order.argsort().to(parts[0].device)]


def errors(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> dict[str, float]:
    return {n: float((g.double() - r).norm() / r.norm()) for n, g, r in zip(NAMES, got, right, strict=True)}


def measure(dtype: torch.dtype, shape: Shape, ranks: list[int], kernel: Kernel, device: torch.device) -> dict[str, Any]:
    inputs = tuple(x.detach() for x in common.random_inputs(shape, shape.S, dtype, device))
    right = dense(*(x.double() for x in inputs))
    rows = {str(n): errors(ring(inputs, n, kernel), right) for n in ranks}
    return {**rows, DENSE: errors(dense(*inputs), right)}


def growths(results: dict[str, dict[str, dict[str, float]]], first: str) -> list[str]:
    """Where an error is above 1.1 times that of the first number of ranks."""
    return [
        f"{dtype}, {ranks} ranks: error of {n} is {row[n] / rows[first][n]:.3f} times that of {first}"
        for dtype, rows in results.items()
        for ranks, row in rows.items()
        for n in NAMES
        if ranks != DENSE and row[n] > 1.1 * rows[first][n]
    ]


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown, one row a number of ranks."""
    lines = ["| dtype | ranks | " + " | ".join(NAMES) + " |", "|---|---|" + "---|" * len(NAMES)]
    for dtype, rows in results.items():
        for name, row in rows.items():
            label = "dense, plain torch" if name == DENSE else name
            lines.append(f"| {dtype} | {label} | " + " | ".join(f"{row[n]:.3e}" for n in NAMES) + " |")
    return "\n".join(lines)


def draw(figure: Any, record: dict[str, Any]) -> None:
    results = record["errors"]
    figure.set_size_inches(10, 4.5)
    for axes, (dtype, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        ranks = [int(n) for n in rows if n != DENSE]
        for n, name in enumerate(NAMES):
            axes.plot(ranks, [rows[str(r)][name] for r in ranks], marker="o", color=f"C{n}", label=name)
            axes.axhline(rows[DENSE][name], color=f"C{n}", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, map(str, ranks))
        axes.set_ylim(bottom=0)
        pictures.plain_axes(axes, f"{dtype} (dotted: dense in plain torch)", "relative error against float64", "ranks")


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    device = common.start(options.device)
    kernel: Kernel = df.kernels.Triton() if common.is_gpu(device) else df.kernels.Reference()
    shape = Shape(1, options.seq_len, options.heads, options.kv_heads, options.head_dim, options.head_dim)
    results = {d: measure(getattr(torch, d), shape, options.ranks, kernel, device) for d in options.dtypes}
    print(f"\n{shape}, causal, zigzag, kernel {kernel!r} on {device.type}\n\n{table(results)}\n")
    record = {"shape": str(shape), "kernel": repr(kernel), "errors": results}
    common.save(f"numerics-{device.type}", options.out, record, draw)
    grown = growths(results, str(options.ranks[0]))
    print("\n".join(grown) or f"no error above 1.1 times that of {options.ranks[0]} rank(s)")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
