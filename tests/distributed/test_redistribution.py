"""Halos and relayouts over gloo: uneven shards, with and without messages between all ranks."""

import pytest
import torch
import torch.distributed as dist

import distflash as df
from tests.random_calls import Dealt


def moved(layout, target):
    """Runs as a rank: checks what it gets; the gradient of all ranks' tokens."""
    cp = df.ContextParallel(dist.group.WORLD, layout)
    x = torch.arange(26, dtype=torch.float64).view(2, 13)
    mine = cp.shard(x).requires_grad_()
    there, whole = cp.relayout(mine, 1, target), cp.gather(mine)
    rows, places = cp.halo(mine, 3, documents=df.Documents([0, 5, 13]))
    expected = df.ContextParallel(dist.group.WORLD, target).shard(x)
    assert torch.equal(there, expected) and torch.equal(whole, x) and torch.equal(rows[:, places], mine)
    (there.sum() + (cp.rank + 1) * whole.sum() + rows.sum()).backward()
    return cp.unshard(mine.grad)[0]


def times_in_a_halo(layout, world_size):
    """How often each token of two documents is in the ranks' rows."""
    times = torch.zeros(13)
    for rank in range(world_size):
        held = layout.positions(13, world_size, rank).tolist()
        for token in held:
            start = 0 if token < 5 else 5
            is_first = token == start or token - 1 not in held
            times[list(range(max(start, token - 3), token)) * is_first + [token]] += 1
    return times


@pytest.mark.parametrize("layout", [df.Zigzag(), df.Contiguous(), Dealt((3, 4, 13), (1, 0, 1))], ids=repr)
def test_gradients_are_those_of_the_sum_of_losses(layout, ranks_of):
    # Of the relayout, of the gather, whose ranks ask for 1, 2 and 3 times the sum, and of the halo.
    expected = 1 + 6 + times_in_a_halo(layout, 3)
    assert all(torch.equal(gradient.float(), expected) for gradient in ranks_of(3).run(moved, layout, df.Striped()))


def refused():
    """Runs as a rank."""
    cp = df.ContextParallel(dist.group.WORLD)
    with pytest.raises(ValueError, match="left: expected a number of rows" if cp.rank else "rank 1 refused this call"):
        cp.halo(torch.zeros(1, 4), -1 if cp.rank else 1)
    return cp.gather(torch.full((1, 2), cp.rank)).shape[1]


def test_a_wrong_argument_of_one_rank_stops_all(ranks_of):
    assert ranks_of(2).run(refused) == [4, 4]
