"""Compile every shipped tile configuration of the Triton kernels without a GPU, and report what became of it.

    python -m tools.compile_report --target sm_90 [--quick] [--json PATH]

Registers, spills and local memory traffic, shared memory, tensor-core instructions, whether the assembler gave up on
overlapping them, and loads that a loop without steps would begin. Exits with 1 where there are such loads, or where
float16 or bfloat16 at head dims 64 and 128 on sm_90 is not clean. Compilation takes the code of a real launch: tensors
without data, and a driver that only names the target.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from distflash.dropout import Dropout
from distflash.kernels.base import KeyGradient, Keys, QueryGradient, Scores
from distflash.kernels.decoding import Store, Table
from distflash.kernels.launch import Launch
from distflash.kernels.triton import decoding_launches, launches
from distflash.plan import Pass
from tools.offline import TargetOnly, Tensors, assemble, table
from tools.ptx import unconditional_loads


@dataclass(frozen=True)
class Target:
    """A compiler target, its rows in the table of tiles, and the shared memory a block of threads may have there."""

    gpu: GPUTarget
    family: str
    shared_limit: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "sm_80", 163 * 1024),
    "sm_86": Target(GPUTarget("cuda", 86, 32), "sm_86", 99 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "sm_90", 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "sm_100", 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "gfx942", 64 * 1024),
}

# How many tiles a kernel loads once, before any loop.
IN_PLACE = {"forward": 1, "dkdv": 2, "dq": 2, "decode": 0, "message": 0, "merge": 0}
DECODING = ("decode", "message", "merge")


@dataclass(frozen=True)
class CompiledPass:
    """One row of the report: a pass and what is special about the call."""

    kernel: str
    d_qk: int
    d_v: int
    dtype: torch.dtype
    group: int = 1
    features: bool = False
    dropout: bool = False

    @property
    def must_be_clean(self) -> bool:
        return self.d_qk == self.d_v and self.d_qk in (64, 128) and self.dtype.itemsize == 2 and not self.features


@dataclass(frozen=True)
class Compiled:
    """What became of one shape.

    ``spills`` in bytes; ``local`` counts loads and stores of spilled registers; ``serialised`` says that the assembler
    waits after every tensor-core instruction; ``over`` that it asks for more shared memory than there is. ``unguarded``
    loads by descriptor for a loop are begun even if it has no step, and then nobody waits for them.
    """

    kernel: str
    dims: str
    dtype: str
    tile: str
    special: str
    registers: int
    spills: int
    local: int
    shared: int
    mma: int
    serialised: bool
    unguarded: int
    over: bool
    instructions: int


def shapes(quick: bool) -> Iterator[CompiledPass]:
    half = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16)
    for kernel in ("forward", "dkdv", "dq"):
        for dtype in half:
            for d in (64, 128):
                yield CompiledPass(kernel, d, d, dtype)
                yield CompiledPass(kernel, d, d, dtype, group=4)
        for d in (64, 128):
            yield CompiledPass(kernel, d, d, torch.bfloat16, group=4, dropout=True)
        if quick:
            continue
        for d_qk, d_v in ((32, 32), (80, 80), (192, 128), (256, 256)):
            yield CompiledPass(kernel, d_qk, d_v, torch.bfloat16)
        yield CompiledPass(kernel, 128, 128, torch.bfloat16, group=4, features=True)
        for d in (64, 128, 256):
            yield CompiledPass(kernel, d, d, torch.float32)
    for kernel in DECODING:
        for d_qk, d_v, dtype in ((128, 128, torch.bfloat16), (192, 128, torch.bfloat16), (128, 128, torch.float32)):
            yield CompiledPass(kernel, d_qk, d_v, dtype, group=4)
        if not quick:
            yield CompiledPass(kernel, 128, 128, torch.bfloat16, group=8, features=True)


def make_launch(shape: CompiledPass, family: str) -> Launch:
    """The launch that a call of this shape makes, on tensors without data."""
    if shape.kernel in DECODING:
        return decoding_launch(shape, family)
    t = Tensors.of(shape.d_qk, shape.d_v, shape.dtype, shape.group)
    per_head = t.per_head if shape.features else None
    dropout = Dropout(6554, torch.empty((), dtype=torch.int64, device="meta")) if shape.dropout else None
    scores = Scores(0.1, 30.0 if shape.features else 0.0, alibi_slopes=per_head, sinks=per_head, dropout=dropout)
    device = launches.device(family, shape.dtype.itemsize, max(shape.d_qk, shape.d_v), has_dropout=shape.dropout)
    rows = replace(t.intervals, in_tiles=shape.dropout)
    keys, each = Keys(t.k, t.v, rows), Pass(0, (0,), (rows,))
    if shape.kernel == "forward":
        return launches.forward(device, t.q, keys, each, scores, t.partial)
    if shape.kernel == "dkdv":
        share = KeyGradient(torch.empty_like(t.k), torch.empty_like(t.v))
        return launches.backward_keys(device, t.saved, keys, scores, share)
    gradient = QueryGradient(torch.empty_like(t.q), torch.empty_like(t.q, dtype=torch.float32))
    return launches.backward_queries(device, t.saved, keys, each, scores, gradient)


def decoding_launch(shape: CompiledPass, family: str) -> Launch:
    """A step of one new token: by a rank alone, a rank's message, or the merge of two."""
    t = Tensors.of(shape.d_qk, shape.d_v, shape.dtype, shape.group)

    def integers(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.int32, device="meta")

    room, ranks = t.k.shape[1], 1 if shape.kernel == "decode" else 2
    store = Store(t.k, t.v, integers(1, room), integers(1, ranks), integers(1), integers(1))
    table = Table(0, integers(1, 2, 2 if shape.features else 1, room))
    scores = Scores(0.1, 30.0 if shape.features else 0.0, t.per_head if shape.features else None)
    sinks, new = t.per_head if shape.features else None, (t.q[:, :1], t.k[:, :1], t.v[:, :1])
    dims = sum(triton.next_power_of_2(d) for d in (shape.d_qk, shape.d_v))
    device = decoding_launches.Device(decoding_launches.choose(family, shape.dtype.itemsize, dims), processors=132)
    if shape.kernel == "decode":
        launch, *_ = decoding_launches.alone_launch(device, *new, store, table, scores, sinks)
    else:
        launch, message = decoding_launches.attend_launch(device, *new, store, table, scores, 0)
        if shape.kernel == "merge":
            results = t.q.new_empty(1, 1, t.q.shape[2], shape.d_v), t.per_head.view(1, 1, -1)
            return decoding_launches.merge_launch(message.expand(2, *message.shape), store, sinks, *results)
    launch.arguments["counters"] = integers(64)
    return launch


def compile_shape(shape: CompiledPass, target: Target) -> Compiled:
    launch = make_launch(shape, target.family)
    made = launch.compile()
    read = _read_amd if target.gpu.backend == "hip" else _read_nvidia
    a = launch.arguments
    shared = int(made.metadata.shared)
    return Compiled(
        kernel=shape.kernel,
        dims=f"{shape.d_qk}/{shape.d_v}",
        dtype=str(shape.dtype).removeprefix("torch."),
        tile=f"{a['BLOCK_M']}x{a.get('BLOCK_N', '-')} w{a['num_warps']} s{a.get('num_stages', '-')}",
        special=" ".join(
            ["group"] * (shape.group > 1) + ["softcap", "alibi", "sinks"] * shape.features + ["dropout"] * shape.dropout
        ),
        shared=shared,
        over=shared > target.shared_limit,
        # Where there are no loads by descriptor, there are none in place either.
        unguarded=max(0, unconditional_loads(made.asm.get("ptx", "")) - IN_PLACE[shape.kernel]),
        **read(made.asm),
    )


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    made = assemble(asm)
    return dict(
        registers=made.registers,
        spills=made.spills,
        local=made.local,
        mma=made.mma,
        serialised=made.serialised,
        instructions=len(made.instructions),
    )


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    names = re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE)
    return dict(
        registers=number("vgpr_count"),
        spills=4 * number("vgpr_spill_count"),
        local=sum(name.startswith("scratch_") for name in names),
        mma=sum("mfma" in name for name in names),
        serialised=False,
        instructions=len(names),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--quick", action="store_true", help="bfloat16 at head dims 64 and 128 only")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    target = TARGETS[options.target]
    driver.set_active(TargetOnly(target.gpu))

    rows, faults = [], []
    for shape in shapes(options.quick):
        row = compile_shape(shape, target)
        rows.append(row)
        clean = not (row.spills or row.local or row.over or row.serialised)
        if options.target == "sm_90" and shape.must_be_clean and not clean:
            faults.append(f"not clean: {row.kernel} {row.dims} {row.dtype} {row.special}")
        if row.unguarded:
            faults.append(f"loads that nobody may wait for: {row.kernel} {row.dims} {row.dtype} {row.special}")
    print(f"triton {triton.__version__}, {options.target}, {target.shared_limit} bytes of shared memory")
    print(table([asdict(row) for row in rows]))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for fault in faults:
        print(fault, file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
