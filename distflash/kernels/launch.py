"""Parts of launches that all GPU kernels share: strides, alignment, and how many heads to schedule at a time.

[Note: shapes] as in `distflash.kernels.base`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tensors that concurrent blocks share should fit into the L2 cache (40 to 60 MB on the supported GPUs).
L2_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Launch:
    """One kernel with its one-dimensional grid (``programs``) and arguments."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def run(self) -> None:
        if self.programs:  # 0 if there are no rows
            self.kernel[(self.programs,)](**self.arguments)

    @property
    def is_compiled(self) -> bool:
        """Whether the kernel is compiled for a device; otherwise it runs in Triton's interpreter."""
        return hasattr(self.kernel, "device_caches")

    def compile(self) -> Any:
        """The compiled kernel that `run` would launch."""
        return self.kernel.run(grid=(self.programs,), warmup=True, **self.arguments)


def aligned(x: Tensor, packed: bool) -> Tensor:
    """``x``, or a contiguous copy if its rows are not aligned, or if ``packed`` and it is not packed; see below."""
    # The usual case first, which costs a tenth of the general one. A tensor without elements is always contiguous.
    if x.numel() and x.is_contiguous() and not x.data_ptr() % 16 and not x.shape[-1] * x.element_size() % 16:
        return x
    fine = is_aligned(x) and (is_packed(x) or not packed)
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def is_aligned(x: Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes."""
    steps = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    whole = all(s > 0 and s * x.element_size() % 16 == 0 for s in steps)
    return whole and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def is_packed(x: Tensor) -> bool:
    """Whether each sequence of the batch starts in memory where the previous one ends."""
    batch, row, _ = steps(x)
    return x.numel() == 0 or batch == x.shape[1] * row


def steps(x: Tensor) -> tuple[int, int, int]:
    """The strides of batches, rows and heads of ``[B, rows, heads, dim]``.

    The stride of a dimension of size 1 is arbitrary: it is replaced by that of a packed tensor.
    """
    B, T, H, D = x.shape
    head = x.stride(2) if H > 1 else D
    row = x.stride(1) if T > 1 else x.stride(0) if B > 1 else H * head
    return x.stride(0) if B > 1 else T * row, row, head


def heads_at_once(*shared: Tensor) -> int:
    """How many heads of the shared tensors ``[B, rows, heads, dim]`` fit into the L2 cache at the same time."""
    head_bytes = sum(x.shape[1] * x.shape[3] * x.element_size() for x in shared)
    return max(1, L2_BYTES // head_bytes)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current GPU, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
