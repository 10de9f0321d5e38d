"""The transport over torch.distributed, and groups for a ContextParallel."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import distflash as df
from distflash.transport import Distributed, Message


def ring(dtype):
    transport = Distributed(dist.group.WORLD)
    rank, W = transport.rank, transport.world_size
    sent, arriving = torch.full((2, 3), rank, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    transport.exchange([Message(sent, (rank + 1) % W)], [Message(arriving, (rank - 1) % W)]).wait()
    return arriving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_ring_of_messages(world_size, dtype, ranks_of):
    for rank, arrived in enumerate(ranks_of(world_size).run(ring, dtype)):
        assert arrived.dtype == dtype and (arrived == (rank - 1) % world_size).all()


def two_kinds_in_one_exchange():
    """Several messages to one peer in order, others to another, and peers that send nothing back."""
    transport = Distributed(dist.group.WORLD)
    if transport.rank == 0:
        sends = [Message(torch.tensor([n]), peer) for n in (1, 2) for peer in (1, 2)]
        transport.exchange(sends, []).wait()
        return []
    rooms = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    transport.exchange([], [Message(room, 0) for room in rooms]).wait()
    return torch.cat(rooms).tolist()


def test_messages_arrive_in_order(ranks_of):
    assert ranks_of(3).run(two_kinds_in_one_exchange) == [[], [1, 2], [1, 2]]


def collectives():
    transport = Distributed(dist.group.WORLD)
    x = torch.full((transport.rank, 2), float(transport.rank))
    before = x.clone()
    results = (
        transport.gather_ints([transport.rank, 2**60]),
        [t.tolist() for t in transport.all_gather(x)],
        transport.all_reduce(x.sum()).item(),
        transport.exchange([], []).wait(),
    )
    assert torch.equal(x, before)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_collectives(world_size, ranks_of):
    of = range(world_size)
    gathered = [[[float(r)] * 2] * r for r in of]
    total = float(sum(2 * r * r for r in of))
    assert ranks_of(world_size).run(collectives) == [([[r, 2**60] for r in of], gathered, total, None)] * world_size


def unshard_and_mean(layout, seq_len):
    """`unshard` and `mean` with their gradients, on shards of different lengths."""
    cp = df.ContextParallel(dist.group.WORLD, layout)
    x = torch.arange(2.0 * seq_len, dtype=torch.float64).view(2, seq_len).requires_grad_()
    mine = cp.shard(x)
    mine.retain_grad()
    whole = cp.unshard(mine)
    mean = cp.mean(mine.sum(), mine.numel(), reduction="sum")
    (whole.sum() + mean).backward()
    expected = cp.world_size + 1 / x.numel()
    return torch.equal(whole, x), float(mean - x.mean()), float((mine.grad - expected).abs().sum())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
def test_unshard_and_mean(layout, world_size, ranks_of):
    for same, mean_off, gradient_off in ranks_of(world_size).run(unshard_and_mean, layout, 11):
        assert same
        assert abs(mean_off) <= 1e-12 and gradient_off <= 1e-12


def mesh_groups():
    """Rank and size in a one-dimensional mesh, in both dimensions of a two-dimensional one, and in all of it."""
    flat = df.ContextParallel(init_device_mesh("cpu", (4,)))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    by_name = [df.ContextParallel(square[name]) for name in ("data", "context")]
    return [(cp.rank, cp.world_size) for cp in (flat, *by_name, df.ContextParallel(square))]


def test_device_meshes(ranks_of):
    assert ranks_of(4).run(mesh_groups) == [[(r, 4), (r // 2, 2), (r % 2, 2), (r, 4)] for r in range(4)]


def refuse_a_group_of_others():
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        return df.ContextParallel(group).world_size
    with pytest.raises(ValueError, match="group: this rank is not a member of it"):
        df.ContextParallel(group)
    return None


def test_a_group_of_others_is_refused(ranks_of):
    assert ranks_of(2).run(refuse_a_group_of_others) == [1, None]
