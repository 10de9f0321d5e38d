"""Whole tensors from slices and global means: the collectives around attention, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distflash.agreement import Agreement
from distflash.layouts import Layout
from distflash.transport import Transport


def take(x: Tensor, dim: int, ranges: tuple[range, ...]) -> Tensor:
    """The positions in ``ranges`` of ``x`` along ``dim``, as a new tensor."""
    # A rank without tokens may have no range at all.
    return torch.cat([x[_along(dim, r)] for r in ranges or (range(0),)], dim=dim)


def _along(dim: int, r: range) -> tuple[slice, ...]:
    return (*(slice(None),) * dim, slice(r.start, r.stop, r.step))


def dimension(x: object, dim: object) -> int:
    """The dimension ``dim`` of ``x``, counted from the front, or a ValueError."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor, got {type(x).__name__}; convert it with torch.as_tensor")
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"dim: expected one of the {x.dim()} dimensions of x {list(x.shape)}, as an int, got {dim!r}; "
            "it is the one that tokens are along"
        )
    return dim % x.dim()


def unshard(x: Tensor, dim: int, layout: Layout, agreement: Agreement) -> Tensor:
    """See `ContextParallel.unshard`."""
    try:
        dim = dimension(x, dim)
    except ValueError:
        agreement.refuse("unshard", sure=True)
        raise
    shape = tuple(0 if n == dim else size for n, size in enumerate(x.shape))
    fields = {"dim": dim, "sizes of x but for dim": shape, "dtype": x.dtype, "layout": layout}
    agreement.require("unshard", lambda: fields)
    return _Unshard.apply(x, dim, layout, agreement)


def refuse_mean(transport: Transport) -> None:
    """Tell the ranks that wait in `mean` that this one raises: without this one they would wait for ever."""
    if transport.world_size > 1:
        transport.all_reduce(torch.full((2,), torch.nan, dtype=torch.float64, device=transport.device))


def mean(loss_sum: Tensor, token_count: Tensor | int, transport: Transport, reduction: str) -> Tensor:
    """See `ContextParallel.mean`."""
    # Ranks whose gradients will be averaged must each bring W times their share.
    factor = transport.world_size if reduction == "mean" else 1
    return _Mean.apply(loss_sum, token_count, transport, factor)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, agreement: Agreement) -> Tensor:
        transport = agreement.transport
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
        ctx.how = dim, layout, agreement
        whole = x.new_empty((*x.shape[:dim], seq_len, *x.shape[dim + 1 :]))
        for rank, part in enumerate(parts):
            start = 0
            for r in layout.ranges(seq_len, W, rank):
                whole[_along(dim, r)] = part.narrow(dim, start, len(r))
                start += len(r)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _TakeOfSum.apply(grad, *ctx.how), None, None, None


class _TakeOfSum(torch.autograd.Function):
    """This rank's slice of the sum of all ranks' tensors. Each of the two is the other's backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, agreement: Agreement) -> Tensor:
        ctx.how = dim, layout, agreement
        shape, transport = tuple(x.shape), agreement.transport
        agreement.require("unshard backward", lambda: {"shape": shape}, key=shape)
        total = transport.all_reduce(x.contiguous())
        return take(total, dim, layout.ranges(x.shape[dim], transport.world_size, transport.rank))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Unshard.apply(grad, *ctx.how), None, None, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, token_count: Tensor | int, transport: Transport, factor: int) -> Tensor:
        count = torch.as_tensor(token_count, dtype=torch.float64, device=loss_sum.device)
        # float64: a sum over a million tokens keeps every digit that the loss has.
        total, tokens = transport.all_reduce(torch.stack([loss_sum.double(), count.reshape(())])).unbind()
        if transport.checks_every_call and bool(tokens.isnan()):
            raise ValueError(
                "token_count: a rank refused its arguments and raised the reason, or has counted NaN tokens; rank "
                f"{transport.rank} stops with it"
            )
        # Where it would be slow to look, a count of NaN becomes a loss of NaN.
        ctx.per_token = torch.where(tokens != 0, factor / tokens, 0.0)
        return torch.where(tokens != 0, total / tokens, 0.0).to(loss_sum.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return (grad * ctx.per_token).to(grad.dtype), None, None, None
