"""Load balancing of the sharded cache: which rank stores each new token.

[Note: shapes] B sequences, W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def storing_ranks(counts: Tensor, new: int) -> Tensor:
    """The rank that stores each new token: the one with the fewest keys so far, the lowest in a tie.

    Args:
        counts: ``[B, W]``, the number of keys that each rank stores.
        new: the number of new tokens.

    Returns:
        int64 ``[B, new]``.
    """
    W = counts.shape[1]
    ranks, nth = torch.arange(W, device=counts.device), torch.arange(new, device=counts.device)
    # A rank with count keys stores its i-th new token once all ranks have count + i: sort by (count + i, rank).
    order = (counts.long()[:, None] + nth[:, None]) * W + ranks
    return order.flatten(1).sort(1).values[:, :new] % W


def rebalance(kept: list[int], new: list[int]) -> list[int]:
    """How many of its ``new`` tokens each rank sends to others (negative: receives); the minimum that balances them.

    Afterwards no rank stores more than the mean, rounded up, unless it did before.
    """
    most = -(-(sum(kept) + sum(new)) // len(kept))
    gives = [min(n, max(0, k + n - most)) for k, n in zip(kept, new, strict=True)]
    left = sum(gives)
    for rank, (k, n) in enumerate(zip(kept, new, strict=True)):
        takes = min(left, max(0, most - k - n))
        left -= takes
        gives[rank] -= takes
    assert left == 0, "the tokens above some ranks' shares fit below those of others"
    return gives
