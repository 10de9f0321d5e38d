"""Compares attention of every kernel, and over all ranks, with a float64 reference.

[Note: shapes] B batch, S tokens, H query heads, G key/value heads, D head dim.

The error may be at most `TIMES` that of plain torch in the same dtype, plus one rounding of the largest gradient.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from distflash.api import attention
from distflash.context import ContextParallel
from distflash.doctor.findings import Finding
from distflash.kernels import Hopper, Kernel, Problem, Reference, Triton
from distflash.mask_algebra import Mask
from distflash.masks import Causal, Documents, Window
from distflash.transport import Alone, Transport

TIMES = 2
KERNELS: tuple[Kernel, ...] = (Reference(), Triton(), Hopper())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEQ_LEN = 261  # not a multiple of any tile
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
RESULTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One call of attention on random tensors, the same on every rank."""

    name: str
    mask: Mask
    dtype: torch.dtype

    def tensors(self, device: torch.device) -> list[Tensor]:
        """q, k, v and the gradient of the output: ``[1, S, H or G, D]``."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, SEQ_LEN, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        return [torch.randn(shape, generator=generator).to(device, self.dtype) for shape in shapes]


def cases(dtype: torch.dtype) -> list[Case]:
    """Grouped-query attention with each mask."""
    documents = Documents([0, 3, 130, 131, 200, SEQ_LEN])
    masks = {"causal": Causal(), "window": Causal() & Window(100), "documents": Causal() & documents}
    return [Case(name, mask, dtype) for name, mask in masks.items()]


def kernels(device: torch.device) -> Iterator[Finding]:
    """Each kernel on this rank: compilation, forward and all gradients."""
    for kernel in KERNELS:
        name = type(kernel).__name__
        problems = {dtype: Problem(device, dtype, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM) for dtype in DTYPES}
        reasons = {dtype: kernel.not_supported_reasons(problem) for dtype, problem in problems.items()}
        if all(reasons.values()):
            yield Finding(name, f"not here: {reasons[DTYPES[0]][0]}")
            continue
        for dtype in DTYPES:
            check = f"{name}, {str(dtype).removeprefix('torch.')}"
            if reasons[dtype]:
                yield Finding(check, f"not here: {reasons[dtype][0]}")
            else:
                yield judged(check, ContextParallel(Alone(device=device), kernel=kernel), cases(dtype), device)


def over_ranks(ranks: Transport, device: torch.device) -> Iterator[Finding]:
    """Attention sharded over all ranks, with the default kernel."""
    for dtype in (torch.bfloat16, torch.float32):
        check = f"over {ranks.world_size} ranks, {str(dtype).removeprefix('torch.')}"
        yield judged(check, ContextParallel(ranks), cases(dtype), device)


def judged(check: str, cp: ContextParallel, problems: list[Case], device: torch.device) -> Finding:
    """The largest error of all cases, relative to its bound."""
    start = time.perf_counter()
    worst, where = 0.0, ""
    for case in problems:
        tensors = case.tensors(device)
        exact, plain = (_dense(case.mask, [x.to(dtype) for x in tensors]) for dtype in (torch.float64, case.dtype))
        found = _on_rank(cp, case.mask, tensors)
        scale = max(float(x.norm()) for x in exact[1:])
        for name, got, expected, dense in zip(RESULTS, found, exact, plain, strict=True):
            floor = torch.finfo(torch.float32).eps * (float(expected.norm()) if name == "out" else scale)
            bound = TIMES * float((dense - expected).norm()) + floor
            excess = float((got.double() - cp.shard(expected)).norm()) / bound
            if not excess <= worst:  # NaN is the worst
                worst, where = inf if excess != excess else excess, f"{case.name}, {name}"
    result = f"{worst:.2f} of the bound ({where}), {time.perf_counter() - start:.1f} s"
    remedy = "wrong results: do not train with this; report the table of versions and this line"
    return Finding(check, result, "" if worst <= 1 else remedy, amount=worst)


def _on_rank(cp: ContextParallel, mask: Mask, tensors: list[Tensor]) -> list[Tensor]:
    """This rank's tokens of the output and of dq, dk, dv."""
    q, k, v, dout = (cp.shard(x) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, mask=mask, cp=cp, seq_len=SEQ_LEN)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _dense(mask: Mask, tensors: list[Tensor]) -> list[Tensor]:
    """Dense attention in plain torch: output and dq, dk, dv, returned in float64."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    group = HEADS // KV_HEADS
    queries, keys, values = (x.transpose(1, 2) for x in leaves)
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    positions = torch.arange(SEQ_LEN)
    visible = mask.materialize(positions, positions, SEQ_LEN).to(q.device)
    scores = (queries @ keys.transpose(2, 3)) * HEAD_DIM**-0.5
    out = (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    return [x.double().detach() for x in (out, *torch.autograd.grad(out, leaves, dout))]
