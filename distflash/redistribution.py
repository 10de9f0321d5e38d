"""Rows of a sequence from other ranks: the rows before a rank's tokens (halo), and the rows of another layout.

[Note: fetch and return] `_Fetch` sends rows to the ranks that need them. `_Return` sends their gradients back to the
rank of each row, which adds them. Each of the two is the backward of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distflash import collectives
from distflash.agreement import Agreement
from distflash.integers import as_int
from distflash.layouts import Layout
from distflash.lengths import as_length, hash_problem
from distflash.masks import Documents
from distflash.routes import Route, halo_route, relayout_route
from distflash.validation import came, hint


def relayout(x: Tensor, dim: int, target: Layout, source: Layout, seq_len: int | None, agreement: Agreement) -> Tensor:
    """See `ContextParallel.relayout`."""
    problem = _layout_problem("layout", target) or _layout_problem("source", source)
    dim, seq_len = _require("relayout", x, dim, source, seq_len, agreement, problem, {"layout": target})
    transport = agreement.transport
    route = relayout_route(source, target, seq_len, transport.world_size, transport.rank, x.device)
    return _Fetch.apply(x, dim, route, "relayout", agreement)


def halo(
    x: Tensor,
    left: int,
    dim: int,
    documents: Documents | None,
    layout: Layout,
    seq_len: int | None,
    agreement: Agreement,
) -> tuple[Tensor, Tensor]:
    """See `ContextParallel.halo`."""
    problem = _left_problem(left) or _documents_problem(documents) or _layout_problem("layout of cp", layout)
    fields = {"left": left, "documents": documents}
    dim, seq_len = _require("halo", x, dim, layout, seq_len, agreement, problem, fields)
    if documents is not None and documents.seq_len != seq_len:  # on all ranks alike, who have agreed on both
        raise ValueError(f"documents: cu_seqlens end at {documents.seq_len}, but the ranks hold {seq_len} tokens")
    count, transport = as_int(left) or 0, agreement.transport
    route, places = halo_route(count, documents, layout, seq_len, transport.world_size, transport.rank, x.device)
    return _Fetch.apply(x, dim, route, "halo", agreement), places


def _require(
    kind: str,
    x: Tensor,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    agreement: Agreement,
    problem: str | None,
    fields: Mapping[str, object],
) -> tuple[int, int]:
    """``dim`` as a non-negative dimension, and the global length. All ranks raise if anything is wrong on any rank.

    With ``seq_len`` the ranks do not exchange their lengths, and agree on each signature once.
    """
    try:
        dim = collectives.dimension(x, dim)
        if problem is not None:
            raise ValueError(problem)
        if agreement.transport.world_size > 1 and not agreement.transport.supports_device(x.device):
            raise ValueError(f"x: is on {x.device}, but the group is on {agreement.transport.device}; move it there")
        if seq_len is not None:
            collectives.require_tokens(x, dim, layout, seq_len, agreement.transport)
    except ValueError:
        agreement.refuse(kind, others_compare=seq_len is None)
        raise
    known = None if seq_len is None else as_length(seq_len)
    compared = {**collectives.equal_fields(x, dim), "layout it has": layout, "seq_len": known, **fields}
    agreement.require(kind, lambda: compared, key=None if known is None else tuple(compared.values()))
    if known is not None:
        return dim, known
    lengths = [length for (length,) in agreement.transport.gather_ints([x.shape[dim]])]
    return dim, collectives.whole_length(lengths, dim, layout)


class _Fetch(torch.autograd.Function):
    """See [Note: fetch and return]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, route: Route, kind: str, agreement: Agreement) -> Tensor:
        ctx.how = dim, route, kind, agreement
        sent = [x.index_select(dim, rows) for rows in route.sends]
        received = collectives.exchange(sent, route.receives, dim, agreement.transport, f"rows of a {kind}")
        nothing = x.new_zeros(collectives.with_rows(x, dim, 1))
        return torch.cat([x, *received, nothing], dim).index_select(dim, route.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _Return.apply(grad, *ctx.how), None, None, None, None


class _Return(torch.autograd.Function):
    """See [Note: fetch and return]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, route: Route, kind: str, agreement: Agreement) -> Tensor:
        ctx.how = dim, route, kind, agreement
        sizes = collectives.equal_fields(x, dim)
        agreement.require(f"{kind} backward", lambda: sizes, key=tuple(sizes.values()))
        counts = [route.held, *route.receives, 1]
        pool = x.new_zeros(collectives.with_rows(x, dim, sum(counts))).index_add_(dim, route.index, x)
        held, *had, _ = pool.split(counts, dim)
        sizes_back = [len(rows) for rows in route.sends]
        returned = collectives.exchange(had, sizes_back, dim, agreement.transport, f"gradients of a {kind}")
        total = held.clone()
        for rows, gradient in zip(route.sends, returned, strict=True):
            total.index_add_(dim, rows, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _Fetch.apply(grad, *ctx.how), None, None, None, None


def _layout_problem(name: str, layout: object) -> str | None:
    if not isinstance(layout, Layout):
        return f"{name}: expected a Layout such as df.Contiguous(), got {came(layout)}{hint(layout)}"
    return hash_problem(name, layout)


def _left_problem(left: object) -> str | None:
    count = as_int(left)
    if count is None or count < 0:
        return f"left: expected a number of rows, an int of at least 0, got {came(left)}; k - 1 for k taps"
    return None


def _documents_problem(documents: object) -> str | None:
    if documents is None or isinstance(documents, Documents):
        return None
    return f"documents: expected df.Documents(cu_seqlens) or None, got {came(documents)}{hint(documents)}"
