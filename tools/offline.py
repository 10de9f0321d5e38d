"""Compiling without a GPU: a driver that names the target, tensors without data, and what the assembler says.

[Note: shapes] as in `distflash.kernels.base`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from distflash.intervals import Intervals
from distflash.kernels.base import BackwardContext
from distflash.partial import Partial, Softmax
from tools import sass


class TargetOnly:
    """A driver without a device: all that compilation asks of one is the target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Tensors:
    """What an attention call and its backward pass take, without data.

    Attributes:
        per_head: float32 ``[H]``, as sinks and slopes are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    intervals: Intervals
    per_head: Tensor
    saved: BackwardContext
    partial: Partial

    @staticmethod
    def of(d_qk: int, d_v: int, dtype: torch.dtype, group: int) -> Tensors:
        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*size, dtype=dtype, device="meta")

        B, T, K, G, wide = 1, 4096, 4096, 4, torch.float32
        H = G * group
        q, dout = empty(B, T, H, d_qk), empty(B, T, H, d_v)
        rows, keys = empty(T, dtype=torch.int32), empty(K, dtype=torch.int32)
        lse, counter = empty(B, H, T, dtype=wide), empty(2, dtype=torch.int32)
        running = Softmax(lse, lse, empty(B, T, H, d_v, dtype=wide))
        return Tensors(
            q=q,
            k=empty(B, K, G, d_qk),
            v=empty(B, K, G, d_v),
            intervals=Intervals(range(K), rows, rows, keys, keys, rows, keys, pairs=0),
            per_head=empty(H, dtype=wide),
            saved=BackwardContext(q, dout, lse, lse, empty(2, B * H, T, dtype=wide), counter=counter),
            partial=Partial(empty(B, T, H, d_v), lse, running, counter),
        )


@dataclass(frozen=True)
class Assembly:
    """What became of a kernel.

    ``registers`` a thread is launched with; ``spills`` in bytes; ``serialised`` says that the assembler waits after
    every tensor-core instruction.
    """

    registers: int
    spills: int
    serialised: bool
    instructions: tuple[sass.Instruction, ...]

    @property
    def local(self) -> int:
        """Loads and stores of spilled registers."""
        return count_local(self.instructions)

    @property
    def mma(self) -> int:
        return sum(i.mma for i in self.instructions)


def count_local(instructions: tuple[sass.Instruction, ...]) -> int:
    return sum(i.local for i in instructions)


def assemble(asm: dict[str, Any]) -> Assembly:
    """The assembler once more on the same PTX, for its remarks, and the instructions that it made."""
    arch = re.search(r"\.target (\w+)", asm["ptx"])[1]
    assembler = get_ptxas(int(re.search(r"\d+", arch)[0])).path
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(asm["ptx"])
        command = [assembler, "-v", f"--gpu-name={arch}", source, "-o", binary]
        remarks = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [knobs.nvidia.cuobjdump.path, "-sass", binary]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Assembly(
        registers=int(re.search(r"Used (\d+) registers", remarks)[1]),
        spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill", remarks)),
        serialised="serialized" in remarks,
        instructions=sass.parse(listing),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Columns under the names of the first row."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: object) -> str:
    return {True: "yes", False: ""}[value] if isinstance(value, bool) else str(value)
