"""Tensors between canaries: a kernel that reads or writes beyond one of its tensors is found out.

Every tensor that is made while `Guard` is entered lies between two margins of bytes 0xFF, NaN in every floating-point
dtype, the second of which begins where the tensor ends. What is read there spoils the result; what is written there
is seen by `Guard.check`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

MARGIN = 2**16  # bytes on each side: a tile of 128 float32 rows of 128 columns


class Guard(TorchDispatchMode):
    """While entered, new CUDA tensors are given margins."""

    def __init__(self) -> None:
        super().__init__()
        self._margins: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = all(returned.alias_info is None for returned in func._schema.returns)
        return tree_map(self.guarded, result) if fresh else result

    def guarded(self, x: Any) -> Any:
        """A copy of a tensor, with the same strides, between margins."""
        if not isinstance(x, Tensor) or not x.is_cuda:
            return x
        with torch._C._DisableTorchDispatch():
            elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
            size = elements * x.element_size()
            memory = torch.full((size + 2 * MARGIN,), 0xFF, dtype=torch.uint8, device=x.device)
            self._margins += [memory[:MARGIN], memory[MARGIN + size :]]
            inner = memory[MARGIN : MARGIN + size].view(x.dtype).as_strided(x.shape, x.stride())
            return inner.copy_(x)

    def check(self) -> None:
        """Assert that no margin was written to."""
        torch.cuda.synchronize()
        touched = [n for n, margin in enumerate(self._margins) if not bool((margin == 0xFF).all())]
        assert not touched, f"{len(touched)} of {len(self._margins)} margins were written to"
