"""Pooling of key heads, to convert weights to grouped-query attention (https://arxiv.org/abs/2305.13245).

Each of the G' new key heads serves a group of H / G' consecutive query heads. It is the mean of the key heads of these
query heads, or that of the first one. A key head counts once per query head, so G need not be a multiple of G'.

[Note: shapes] H query heads, G key heads before, G' after, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "first"]


def pool_heads(x: Tensor, heads: int, kv_heads: int, into: int, method: Pooling = "mean") -> Tensor:
    """The rows of a key or value projection, its weight or its bias, for fewer key heads.

    Args:
        x: ``[kv_heads * D, ...]``, floating point, unsharded; the rows of a head are consecutive.
        heads: query heads H.
        kv_heads: key heads G before, a divisor of H.
        into: key heads G' after, a divisor of H and less than G.
        method: "mean" over the query heads of a group, in float64; "first" takes the head of the first of them.

    Returns:
        ``[into * D, ...]``, in the dtype of x. Exactly the heads of a group where they are equal.

    Raises:
        ValueError: the numbers of heads do not fit one another or the tensor, or the method is another.

    Examples:
        >>> weight = torch.tensor([[1.0], [3.0], [5.0], [7.0]])  # 4 key heads of one channel
        >>> df.nn.pool_heads(weight, heads=8, kv_heads=4, into=2)
        tensor([[2.],
                [6.]])
    """
    if (problem := heads_problem(heads, kv_heads, into)) is not None:
        raise ValueError(problem)
    if x.dim() == 0 or x.shape[0] % kv_heads or not x.is_floating_point():
        raise ValueError(
            f"x: expected floating-point rows of {kv_heads} key heads, got {x.dtype} of shape {list(x.shape)}; pass "
            "the whole tensor, before it is sharded or quantized"
        )
    if method not in ("mean", "first"):
        raise ValueError(f'method: expected "mean" or "first", got {method!r}')
    # The key head of each query head, by groups of query heads.
    sources = (torch.arange(heads, device=x.device) // (heads // kv_heads)).view(into, heads // into)
    by_head = x.view(kv_heads, -1)
    if method == "first":
        pooled = by_head[sources[:, 0]]
    else:
        pooled = torch.stack([by_head[group].to(torch.float64).mean(0) for group in sources])
    return pooled.to(x.dtype).view(-1, *x.shape[1:])


def heads_problem(heads: int, kv_heads: int, into: int) -> str | None:
    """Why the key heads of attention with so many query heads cannot become `into`; None if they can."""
    if not isinstance(into, int) or isinstance(into, bool) or into < 1:
        return f"kv_heads: expected an int of at least 1, got {into!r}"
    if heads % into:
        return f"kv_heads: {into} does not divide the {heads} query heads; choose a divisor"
    if into >= kv_heads:
        return f"kv_heads: {into} is not less than the {kv_heads} key heads that there are; choose a smaller divisor"
    if heads % kv_heads:
        return f"heads: the {kv_heads} key heads that there are do not divide the {heads} query heads"
    return None
