"""Time candidate tiles for each pass of the Triton kernels on this GPU: where the shipped table's numbers come from.

    python tools/tune_triton.py --shapes 1x16384x16/16x128:full 1x16384x32/32x64:causal --json tiles.json

A shape is BATCHxSEQxHEADS/KV_HEADSxDIM[/DIM_V]:MASK[:DTYPE]. Candidates compile in parallel processes, each is checked
against the shipped tiles' result, then timed (median). One that fails is recorded with its reason and left out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distflash import masks
from distflash.geometry import Geometry
from distflash.intervals import build
from distflash.kernels.base import KeyGradient, Keys, QueryGradient, Scores
from distflash.kernels.triton.kernel import family, saved_of
from distflash.kernels.triton.tiles import Tile, Tiles, choose
from distflash.layouts import Contiguous
from distflash.partial import Partial
from distflash.plan import Pass

PASSES = ("forward", "dkdv", "dq")
# Products of the size of q.k^T that a pass makes; a backward pass counts as five whatever it recomputes.
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3}


@dataclass(frozen=True)
class TimedProblem:
    """One problem to time, and its name on the command line."""

    name: str
    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    mask: str
    dtype: torch.dtype

    @staticmethod
    def parse(text: str) -> TimedProblem:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)/(\d+)x(\d+)(?:/(\d+))?:(full|causal)(?::(\w+))?", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"not BATCHxSEQxHEADS/KV_HEADSxDIM[/DIM_V]:MASK[:DTYPE]: {text}")
        *sizes, d_v, mask, dtype = match.groups()
        b, s, h, g, d = map(int, sizes)
        return TimedProblem(text, b, s, h, g, d, int(d_v or d), mask, getattr(torch, dtype or "bfloat16"))


@dataclass
class Result:
    """One candidate: its time, or why it has none."""

    shape: str
    kernel: str
    tile: Tile
    shipped: bool
    ms: float | None = None
    tflops: float | None = None
    failure: str | None = None


class Bench:
    """The tensors of a shape on the GPU, and the launches of its passes with any tile."""

    def __init__(self, shape: TimedProblem) -> None:
        def normal(heads: int, dim: int) -> Tensor:
            return torch.randn(shape.batch, shape.seq_len, heads, dim, device="cuda", dtype=shape.dtype)

        self.shape = shape
        self.q, self.dout = normal(shape.heads, shape.d_qk), normal(shape.heads, shape.d_v)
        k, v = normal(shape.kv_heads, shape.d_qk), normal(shape.kv_heads, shape.d_v)
        mask = masks.Full() if shape.mask == "full" else masks.Causal()
        (rows,) = build(Geometry.of_sequence(mask, Contiguous(), shape.seq_len, 1), 0, 0)
        self.only = Pass(0, (0,), (rows.to(self.q.device),))
        self.keys = Keys(k, v, self.only.visible[0])
        self.scores = Scores(shape.d_qk**-0.5)
        self.into = Partial.empty(self.q, shape.d_v, between=False)
        self.dq = QueryGradient(torch.empty_like(self.q), None)
        self.dkv = KeyGradient(torch.empty_like(k), torch.empty_like(v))
        self.name = family(self.q.device)
        largest = 1 << (max(shape.d_qk, shape.d_v) - 1).bit_length()
        self.shipped = choose(self.name, shape.dtype.itemsize, largest)
        from distflash.kernels.triton import launches

        self.launches = launches
        self.launch("forward", self.shipped).run()
        self.saved = saved_of(self.q, self.into.final, self.into.lse.clone(), self.dout)
        launches.statistics(self.saved, self.into.final, None).run()

    def launch(self, kernel: str, tiles: Tiles) -> Any:
        device = self.launches.device(self.name, self.q.element_size(), self.shape.d_qk, tiles)
        if kernel == "forward":
            return self.launches.forward(device, self.q, self.keys, self.only, self.scores, self.into)
        if kernel == "dkdv":
            return self.launches.backward_keys(device, self.saved, self.keys, self.scores, self.dkv)
        return self.launches.backward_queries(device, self.saved, self.keys, self.only, self.scores, self.dq)

    def outputs(self, kernel: str) -> tuple[Tensor, ...]:
        return {"forward": (self.into.final,), "dkdv": (self.dkv.dk, self.dkv.dv), "dq": (self.dq.final,)}[kernel]

    def flops(self, kernel: str) -> float:
        s = self.shape
        return PRODUCTS[kernel] * 2.0 * s.batch * s.heads * self.only.pairs * (s.d_qk + s.d_v) / 2


def candidates(kernel: str, shape: TimedProblem) -> list[Tile]:
    """Tiles worth trying: from small with few warps to the largest whose accumulators fit in the registers."""
    blocks = (32, 64, 128) if max(shape.d_qk, shape.d_v) > 128 or shape.dtype == torch.float32 else (64, 128)
    rows = (*blocks, 256) if kernel == "forward" else blocks
    tiles = []
    for m, n, warps, stages in itertools.product(rows, blocks, (4, 8), (1, 2, 3, 4)):
        area = {"forward": (64 * 64, 128 * 256), "dkdv": (32 * 32, 128 * 128), "dq": (32 * 32, 128 * 128)}[kernel]
        held = {"forward": m, "dkdv": n, "dq": m}[kernel]  # rows of the accumulators
        if area[0] <= m * n <= area[1] and held >= 16 * warps and m * n <= 64 * 64 * warps // 2:
            tiles.append(Tile(m, n, warps, stages))
    return tiles


def with_tile(tiles: Tiles, kernel: str, tile: Tile) -> Tiles:
    return replace(tiles, **{kernel: tile})


def precompile(job: tuple[TimedProblem, str, Tile]) -> str | None:
    """In a process of its own: compile into the cache on disk. Returns why it failed, if it did."""
    shape, kernel, tile = job
    try:
        # Compilation depends on no length: short sequences keep the processes' memory small.
        bench = Bench(replace(shape, batch=1, seq_len=256))
        bench.launch(kernel, with_tile(bench.shipped, kernel, tile)).compile()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:160]
    return None


def compile_all(jobs: list[tuple[TimedProblem, str, Tile]], workers: int) -> None:
    """Fill the disk cache. A job that fails here fails again, with its reason, when it is timed."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for _ in pool.map(precompile, jobs, chunksize=2):
            pass


def measure(bench: Bench, kernel: str, tile: Tile, reference: tuple[Tensor, ...], limit_ms: int) -> Result:
    import triton

    tiles = with_tile(bench.shipped, kernel, tile)
    result = Result(bench.shape.name, kernel, tile, shipped=tile == getattr(bench.shipped, kernel))
    try:
        launch = bench.launch(kernel, tiles)
        for output in bench.outputs(kernel):
            output.fill_(torch.nan)
        launch.run()
        for got, want in zip(bench.outputs(kernel), reference, strict=True):
            # Two tilings differ by the order of their sums alone: by less than the rounding of the result.
            error = (got - want).float().norm() / want.float().norm()
            if not error <= torch.finfo(got.dtype).eps:
                raise ArithmeticError(f"differs by {error:.1e} from the shipped tile")
        result.ms = triton.testing.do_bench(launch.run, warmup=limit_ms // 4, rep=limit_ms, return_mode="median")
        result.tflops = bench.flops(kernel) / result.ms / 1e9
    except Exception as error:
        result.failure = f"{type(error).__name__}: {error}"[:160]
    return result


def tune(shape: TimedProblem, options: argparse.Namespace, late: Callable[[], bool]) -> list[Result]:
    bench = Bench(shape)
    results = []
    for kernel in options.passes:
        bench.launch(kernel, bench.shipped).run()
        reference = tuple(output.clone() for output in bench.outputs(kernel))
        shipped = getattr(bench.shipped, kernel)
        rest = [tile for tile in candidates(kernel, shape) if tile != shipped]
        for tile in [shipped, *rest]:
            if late():
                break
            results.append(measure(bench, kernel, tile, reference, options.rep))
        show(shape, kernel, [r for r in results if r.kernel == kernel], options.top)
    return results


def show(shape: TimedProblem, kernel: str, results: list[Result], top: int) -> None:
    timed = sorted((r for r in results if r.ms is not None), key=lambda r: r.ms)
    print(f"{shape.name} {kernel}: {len(timed)} timed, {len(results) - len(timed)} failed", flush=True)
    for r in [*timed[:top], *(r for r in timed[top:] if r.shipped)]:
        t = r.tile
        mark = " <- shipped" if r.shipped else ""
        name = f"{t.block_m}x{t.block_n} w{t.num_warps} s{t.num_stages}"
        print(f"  {name:16} {r.ms:8.3f} ms  {r.tflops:6.1f} TFLOP/s{mark}", flush=True)
    for r in results:
        if r.failure and "OutOfResources" not in r.failure:
            print(f"  failed: {r.tile} {r.failure}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=TimedProblem.parse, required=True)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; what is left over is not timed")
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of timing for each candidate")
    parser.add_argument("--top", type=int, default=6, help="how many of the fastest to print")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write all results there")
    options = parser.parse_args()

    start = time.monotonic()
    # One compilation serves all shapes that differ in nothing but sizes.
    distinct = {(s.heads // s.kv_heads, s.d_qk, s.d_v, s.dtype): s for s in options.shapes}.values()
    jobs = [(s, kernel, tile) for s in distinct for kernel in options.passes for tile in candidates(kernel, s)]
    compile_all(jobs, options.workers)
    print(f"compiled {len(jobs)} candidates in {time.monotonic() - start:.0f} s", flush=True)

    results: list[Result] = []
    for shape in options.shapes:
        results += tune(shape, options, lambda: time.monotonic() - start > options.budget)
        torch.cuda.empty_cache()
        if options.json:
            rows = [asdict(r) for r in results]
            options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
