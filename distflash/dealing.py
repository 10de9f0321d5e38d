"""Who keeps which new token: keys are dealt so that ranks fill up evenly.

[Note: shapes] B sequences, W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keepers(counts: Tensor, new: int) -> Tensor:
    """int64 ``[B, new]``: the rank that keeps each new token, in order: the one that has fewest then, the first of
    several.

    Args:
        counts: ``[B, W]``, how many each rank keeps before.
        new: how many tokens come.
    """
    W = counts.shape[1]
    ranks, nth = torch.arange(W, device=counts.device), torch.arange(new, device=counts.device)
    # A rank's (i + 1)-th new one comes when all have as many as it had before: in the order of (count + i, rank).
    order = (counts.long()[:, None] + nth[:, None]) * W + ranks
    return order.flatten(1).sort(1).values[:, :new] % W


def level(kept: list[int], new: list[int]) -> list[int]:
    """How many of its ``new`` tokens each rank gives away, or, negative, takes, so that all have room.

    No rank then has more than its share of all tokens, rounded up, unless it has kept more before. As few as possible
    move.
    """
    most = -(-(sum(kept) + sum(new)) // len(kept))
    gives = [min(n, max(0, k + n - most)) for k, n in zip(kept, new, strict=True)]
    left = sum(gives)
    for rank, (k, n) in enumerate(zip(kept, new, strict=True)):
        takes = min(left, max(0, most - k - n))
        left -= takes
        gives[rank] -= takes
    assert left == 0, "what is above the share of some ranks fits below that of others"
    return gives
