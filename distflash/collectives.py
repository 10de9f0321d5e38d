"""Collectives around attention, with their gradients: full tensors from shards, and global means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distflash.agreement import Agreement
from distflash.layouts import Layout
from distflash.lengths import as_length, require_seq_len
from distflash.transport import Message, Transport


def take(x: Tensor, dim: int, ranges: tuple[range, ...]) -> Tensor:
    """The positions in ``ranges`` of ``x`` along ``dim``, as a new tensor."""
    # A rank without tokens may have no ranges.
    return torch.cat([x[_along(dim, r)] for r in ranges or (range(0),)], dim=dim)


def _along(dim: int, r: range) -> tuple[slice, ...]:
    return (*(slice(None),) * dim, slice(r.start, r.stop, r.step))


def dimension(x: object, dim: object) -> int:
    """``dim`` as a non-negative dimension of ``x``, or a ValueError."""
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
        agreement.refuse("unshard", others_compare=True)
        raise
    agreement.require("unshard", lambda: {**equal_fields(x, dim), "layout": layout})
    return _Unshard.apply(x, dim, layout, agreement, None)


def gather(x: Tensor, dim: int, seq_len: int, layout: Layout, agreement: Agreement) -> Tensor:
    """See `ContextParallel.gather`: `unshard` without a synchronisation, once the signature is known."""
    transport = agreement.transport
    try:
        dim = dimension(x, dim)
        require_tokens(x, dim, layout, seq_len, transport)
    except ValueError:
        agreement.refuse("gather", others_compare=False)
        raise
    fields = {**equal_fields(x, dim), "seq_len": as_length(seq_len), "layout": layout}
    agreement.require("gather", lambda: fields, key=tuple(fields.values()))
    return _Unshard.apply(x, dim, layout, agreement, as_length(seq_len))


def equal_fields(x: Tensor, dim: int) -> dict[str, object]:
    """Fields of a tensor that must be equal on all ranks."""
    return {"dim": dim, "sizes of x but for dim": tuple(with_rows(x, dim, 0)), "dtype": x.dtype}


def with_rows(x: Tensor, dim: int, count: int) -> list[int]:
    """The shape of ``x`` with ``count`` rows along ``dim``."""
    return [count if n == dim else size for n, size in enumerate(x.shape)]


def require_tokens(x: Tensor, dim: int, layout: Layout, seq_len: int, transport: Transport) -> None:
    """Raise a ValueError if ``x`` does not have this rank's number of tokens."""
    expected = layout.length(require_seq_len(seq_len), transport.world_size, transport.rank)
    if x.shape[dim] != expected:
        raise ValueError(
            f"x: {x.shape[dim]} tokens along dimension {dim}, but {layout!r} gives rank {transport.rank} of "
            f"{transport.world_size} {expected} of seq_len={seq_len}"
        )


def whole_length(lengths: list[int], dim: int, layout: Layout) -> int:
    """The global length, from the ranks' lengths. Raises a ValueError if they do not fit the layout."""
    seq_len = sum(lengths)
    expected = [layout.length(seq_len, len(lengths), rank) for rank in range(len(lengths))]
    if lengths != expected:
        raise ValueError(
            f"x: ranks hold {lengths} along dimension {dim}, but {layout!r} gives them {expected} of {seq_len}; "
            "pass what was sharded by the same layout, along the same dimension"
        )
    return seq_len


def exchange(sends: Sequence[Tensor], counts: Sequence[int], dim: int, transport: Transport, what: str) -> list[Tensor]:
    """Exchange rows with all other ranks. All ranks must call it.

    Args:
        sends: by rank, the tensor that is sent to it. Only the number of rows along ``dim`` differs. Nothing is sent to
            this rank itself.
        counts: by rank, the number of rows that are received from it.
        what: what the rows are, in words, for errors.

    Returns:
        By rank, the tensor received from it.
    """
    received = [sends[0].new_empty(with_rows(sends[0], dim, count)) for count in counts]
    outgoing, incoming = (
        [
            Message(x.contiguous().resolve_neg(), peer, what)
            for peer, x in enumerate(tensors)
            if peer != transport.rank and x.shape[dim]
        ]
        for tensors in (sends, received)
    )
    transport.exchange(outgoing, incoming).wait()
    return received


def refuse_mean(transport: Transport) -> None:
    """Tell the ranks in `mean` that this rank raises; otherwise they would wait for it."""
    if transport.world_size > 1:
        transport.all_reduce(torch.full((2,), torch.nan, dtype=torch.float64, device=transport.device))


def mean(loss_sum: Tensor, token_count: Tensor | int, transport: Transport, reduction: str) -> Tensor:
    """See `ContextParallel.mean`."""
    # Averaging gradients divides them by W, which this factor undoes.
    factor = transport.world_size if reduction == "mean" else 1
    return _Mean.apply(loss_sum, token_count, transport, factor)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, agreement: Agreement, seq_len: int | None) -> Tensor:
        transport = agreement.transport
        if seq_len is None:
            parts = transport.all_gather(x.contiguous().resolve_neg())
            seq_len = whole_length([part.shape[dim] for part in parts], dim, layout)
        else:
            parts = _gather_known(x, dim, layout, seq_len, transport)
        ctx.how = dim, layout, agreement
        whole = x.new_empty((*x.shape[:dim], seq_len, *x.shape[dim + 1 :]))
        for rank, part in enumerate(parts):
            start = 0
            for r in layout.ranges(seq_len, transport.world_size, rank):
                whole[_along(dim, r)] = part.narrow(dim, start, len(r))
                start += len(r)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _TakeOfSum.apply(grad, *ctx.how), None, None, None, None


def _gather_known(x: Tensor, dim: int, layout: Layout, seq_len: int, transport: Transport) -> list[Tensor]:
    """Every rank's rows. Their numbers are known from ``seq_len``."""
    lengths = [layout.length(seq_len, transport.world_size, rank) for rank in range(transport.world_size)]
    padded = x.new_zeros(with_rows(x, dim, max(lengths)))
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    parts = transport.gather_equal(padded)
    return [part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)]


class _TakeOfSum(torch.autograd.Function):
    """This rank's shard of the sum over ranks (reduce-scatter). It and `_Unshard` are each other's backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, agreement: Agreement) -> Tensor:
        ctx.how = dim, layout, agreement
        shape, transport = tuple(x.shape), agreement.transport
        W = transport.world_size
        agreement.require("unshard backward", lambda: {"shape": shape}, key=shape)
        parts = [take(x, dim, layout.ranges(x.shape[dim], W, rank)) for rank in range(W)]
        counts = [parts[transport.rank].shape[dim]] * W
        summands = exchange(parts, counts, dim, transport, "gradients of an unshard")
        summands[transport.rank] = parts[transport.rank]
        return torch.stack(summands).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Unshard.apply(grad, *ctx.how, None), None, None, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, token_count: Tensor | int, transport: Transport, factor: int) -> Tensor:
        count = torch.as_tensor(token_count, dtype=torch.float64, device=loss_sum.device)
        # float64, so that a sum over a million tokens keeps all digits of the loss.
        total, tokens = transport.all_reduce(torch.stack([loss_sum.double(), count.reshape(())])).unbind()
        if transport.verifies_every_call and bool(tokens.isnan()):
            raise ValueError(
                "token_count: a rank refused its arguments and raised the reason, or has counted NaN tokens; rank "
                f"{transport.rank} stops with it"
            )
        # On GPUs a check would synchronise; a count of NaN makes the loss NaN.
        ctx.per_token = torch.where(tokens != 0, factor / tokens, 0.0)
        return torch.where(tokens != 0, total / tokens, 0.0).to(loss_sum.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return (grad * ctx.per_token).to(grad.dtype), None, None, None
