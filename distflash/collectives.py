"""Whole tensors from slices and global means: the collectives around attention, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distflash.layouts import Layout
from distflash.transport import Transport


def take(x: Tensor, dim: int, ranges: tuple[range, ...]) -> Tensor:
    """The positions in ``ranges`` of ``x`` along ``dim``, as a new tensor."""
    dim = dim % x.dim()
    # A rank without tokens may have no range at all.
    return torch.cat([x[_along(dim, r)] for r in ranges or (range(0),)], dim=dim)


def _along(dim: int, r: range) -> tuple[slice, ...]:
    return (*(slice(None),) * dim, slice(r.start, r.stop, r.step))


def unshard(x: Tensor, dim: int, layout: Layout, transport: Transport) -> Tensor:
    """See `ContextParallel.unshard`."""
    return _Unshard.apply(x, dim % x.dim(), layout, transport)


def mean(loss_sum: Tensor, token_count: Tensor | int, transport: Transport, reduction: str) -> Tensor:
    """See `ContextParallel.mean`."""
    # Ranks whose gradients will be averaged must each bring W times their share.
    factor = transport.world_size if reduction == "mean" else 1
    return _Mean.apply(loss_sum, token_count, transport, factor)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, transport: Transport) -> Tensor:
        parts = transport.all_gather(x.contiguous())
        lengths = [part.shape[dim] for part in parts]
        seq_len = sum(lengths)
        W = transport.world_size
        expected = [layout.length(seq_len, W, rank) for rank in range(W)]
        if lengths != expected:
            raise ValueError(
                f"x: ranks hold {lengths} along dimension {dim}, but {layout!r} gives them {expected} of {seq_len}; "
                "unshard what was sharded by the same layout, along the same dimension"
            )
        ctx.dim, ctx.transport = dim, transport
        ctx.ranges = layout.ranges(seq_len, W, transport.rank)
        whole = x.new_empty((*x.shape[:dim], seq_len, *x.shape[dim + 1 :]))
        for rank, part in enumerate(parts):
            start = 0
            for r in layout.ranges(seq_len, W, rank):
                whole[_along(dim, r)] = part.narrow(dim, start, len(r))
                start += len(r)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        total = ctx.transport.all_reduce(grad.contiguous())
        return take(total, ctx.dim, ctx.ranges), None, None, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, token_count: Tensor | int, transport: Transport, factor: int) -> Tensor:
        count = torch.as_tensor(token_count, dtype=torch.float64, device=loss_sum.device)
        # float64: a sum over a million tokens keeps every digit that the loss has.
        total, tokens = transport.all_reduce(torch.stack([loss_sum.double(), count.reshape(())])).unbind()
        ctx.per_token = torch.where(tokens > 0, factor / tokens, 0.0)
        return torch.where(tokens > 0, total / tokens, 0.0).to(loss_sum.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return (grad * ctx.per_token).to(grad.dtype), None, None, None
