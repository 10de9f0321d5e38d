"""Schedules over real processes, on meshes of one and two dimensions."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import distflash as df
from distflash.kernels import Reference
from tests.dense import Problem, assert_exact, assert_no_less_exact, in_dtype, join, make_inputs, on_rank, on_ranks
from tests.poison import poison_memory

PROBLEMS = {
    "causal": Problem(df.Causal(), 61, batch=2, heads=4, kv_heads=2),
    "all options": Problem(df.Causal() & (df.Window(9) | df.FirstTokens(3)), 45, 1, 8, 1, softcap=2.0, sinks=True),
}
ON_ONE = [df.Ring(), df.AllGather(1), df.AllGather(2), df.Ulysses()]
ON_TWO = [df.Ring(), df.Ulysses(), df.Ulysses(dim=0), df.Ulysses(df.AllGather(), dim=0)]


def part(p, layout, schedule, shape=None):
    """Runs as a rank: its part of a problem, on the group or on a mesh of this shape."""
    poison_memory()
    group = dist.group.WORLD if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    return on_rank(p, make_inputs(p), df.ContextParallel(group, layout, schedule, Reference()))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("layout", [df.Zigzag(), df.Striped()], ids=repr)
@pytest.mark.parametrize("schedule", ON_ONE, ids=repr)
@pytest.mark.parametrize("world_size", [2, 4])
def test_exact(world_size, schedule, layout, name, ranks_of):
    p = PROBLEMS[name]
    assert_exact(p, make_inputs(p), join(ranks_of(world_size).run(part, p, layout, schedule), layout, p.seq_len))


def alone(p, schedule):
    """Runs as a rank: the whole problem, with the same memory and threads as the ranks have."""
    poison_memory()
    return on_rank(p, make_inputs(p), df.ContextParallel(df.transport.Alone(), schedule=schedule, kernel=Reference()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_reproducible_bits_are_those_of_one_rank(world_size, name, dtype, ranks_of):
    p, layout, schedule = in_dtype(PROBLEMS[name], dtype), df.WholeChunks(df.Zigzag(), 4), df.Reproducible(4)
    ranks = ranks_of(world_size)
    got = join(ranks.run(part, p, layout, schedule), layout, p.seq_len)
    for expected in ranks.run(alone, p, schedule):
        assert all(torch.equal(got[result], expected[result]) for result in got)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("schedule", ON_TWO, ids=repr)
def test_exact_on_a_mesh_of_two_by_two(schedule, name, ranks_of):
    p, layout = PROBLEMS[name], df.Zigzag()
    run = ranks_of(4).run
    assert_exact(p, make_inputs(p), join(run(part, p, layout, schedule, (2, 2)), layout, p.seq_len))
    p = in_dtype(p, torch.bfloat16)
    got = join(run(part, p, layout, schedule, (2, 2)), layout, p.seq_len)
    assert_no_less_exact(p, make_inputs(p), got, on_ranks(p, make_inputs(p), 1, layout))


def three_dimensions():
    with pytest.raises(ValueError) as caught:
        df.ContextParallel(init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "c")))
    return str(caught.value)


def test_a_mesh_of_three_dimensions_is_refused(ranks_of):
    for text in ranks_of(4).run(three_dimensions):
        assert "expected a DeviceMesh of one or two dimensions, got dimensions ('a', 'b', 'c')" in text
