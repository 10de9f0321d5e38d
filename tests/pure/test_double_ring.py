"""The double ring: order of sources, traffic between nodes, and prefetch distance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.geometry import Geometry
from distflash.plan import What
from tests.strategies import geometries


def plans_of(schedule, mask, W, layout=None, tokens=8):
    geometry = Geometry.of_sequence(mask, layout or df.Zigzag(), tokens * W, W)
    return [schedule.plan(geometry, rank) for rank in range(W)]


def keys(plan):
    """``(stage, until, source, from whom)`` of all keys that arrive."""
    arriving = [(n, t) for n, stage in enumerate(plan.forward) for t in stage.transfers if not t.sends]
    return [(n, t.until, t.of, t.peer) for n, t in arriving if t.what is What.KEYS]


def test_the_order_of_two_nodes_of_three():
    assert [s for (s,) in df.DoubleRing(3).sources(1, 6)] == [1, 0, 2, 4, 3, 5]
    assert [s for (s,) in df.DoubleRing(3).sources(3, 6)] == [3, 5, 4, 0, 2, 1]


@pytest.mark.parametrize(("W", "L"), [(1, 1), (6, 6), (8, 8), (12, 6), (16, 8), (64, 8), (11, 1)])
def test_a_node_is_of_the_most_ranks_up_to_eight_that_divide_all(W, L):
    assert df.DoubleRing().sources(W - 1, W) == df.DoubleRing(L).sources(W - 1, W)


@given(geometries())
def test_one_node_is_the_ring(geometry):
    W = geometry.world_size
    for rank in range(W):
        ring = str(df.Ring().plan(geometry, rank))
        assert str(df.DoubleRing(W).plan(geometry, rank)) == ring
        assert str(df.DoubleRing(1).plan(geometry, rank)) == ring  # every rank a node of its own


@pytest.mark.parametrize(("W", "L"), [(4, 2), (6, 3), (9, 3), (8, 2), (16, 8), (16, 4), (32, 8)])
@pytest.mark.parametrize("mask", [df.Full(), df.Causal()], ids=repr)
def test_keys_come_from_the_node_but_for_one_rank_a_node_which_set_out_a_whole_ring_ahead(W, L, mask):
    for rank, plan in enumerate(plans_of(df.DoubleRing(L), mask, W)):
        arriving = keys(plan)
        assert len(arriving) == W - 1
        far = [(n, until, source, peer) for n, until, source, peer in arriving if peer // L != rank // L]
        assert [until for _, until, _, _ in far] == [o * L for o in range(1, W // L)]
        assert all(until - n == L and peer % L == rank % L for n, until, _, peer in far)
        near = [(n, until) for n, until, _, peer in arriving if peer // L == rank // L]
        assert all(until - n == 1 for n, until in near)
        if mask == df.Full():  # nothing crosses that a rank of the node has
            assert all(peer == (rank - L) % W for _, _, _, peer in far)


@given(geometries(), st.sampled_from([1, 2, 4]))
def test_as_much_moves_as_in_the_ring(geometry, L):
    if geometry.world_size % L:
        L = 1
    for rank in range(geometry.world_size):
        ring, double = (schedule.plan(geometry, rank) for schedule in (df.Ring(), df.DoubleRing(L)))
        for what in (What.KEYS, What.KEY_GRADIENTS):
            assert ring.moved(what, backward=True) == double.moved(what, backward=True)


@pytest.mark.parametrize("ranks_per_node", [0, -1, 1.5, True, "8"])
def test_what_is_no_number_of_ranks_is_refused(ranks_per_node):
    with pytest.raises(ValueError, match=r"DoubleRing\(ranks_per_node\): expected a number of ranks, at least 1"):
        df.DoubleRing(ranks_per_node)


def test_nodes_of_unequal_sizes_are_refused_on_every_rank_and_nothing_is_sent():
    simulator = df.transport.Simulator(6)

    def work(transport):
        cp = df.ContextParallel(transport, schedule=df.DoubleRing(4))
        x = torch.zeros(1, 3, 2, 8)
        with pytest.raises(ValueError) as caught:
            df.attention(x, x, x, cp=cp)
        return str(caught.value)

    assert set(simulator.run(work)) == {
        "schedule: DoubleRing(ranks_per_node=4) over 6 ranks; expected nodes of equally many ranks, so a number that "
        "divides 6: 1, 2, 3, 6. Where nodes are unequal, use df.Ring()"
    }
    assert simulator.traffic.messages == 0


def test_a_mesh_says_how_many_ranks_a_node_has():
    def per_node(transport):
        return df.ContextParallel(transport, schedule=df.DoubleRing()).schedule.ranks_per_node

    assert df.transport.Simulator(6, shape=(3, 2)).run(per_node) == [2] * 6
    assert df.transport.Simulator(6).run(per_node) == [None] * 6
    assert df.DoubleRing(3).on((3, 2)) == df.DoubleRing(3)
