"""Rewrites of plans: deferred heads, and that the result stays the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.geometry import Geometry
from distflash.kernels.base import Abilities
from distflash.overlap import overlap
from distflash.plan import Gradients, What
from distflash.turns import turns_of
from tests.plans import check
from tests.strategies import examples, geometries, schedules

blocks = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9))
abilities = st.builds(Abilities, st.booleans(), st.booleans(), st.integers(0, 40), st.booleans(), blocks)


@examples(100)
@given(geometries(), schedules, st.integers(1, 8), abilities, st.booleans())
def test_what_is_computed_stays_the_same(geometry, schedule, kv_heads, able, intra_node):
    plans = [schedule.plan(geometry, rank) for rank in range(geometry.world_size)]
    check([overlap(plan, kv_heads, 1, able, intra_node) for plan in plans], geometry, kv_heads)


HEADS_APART = Abilities(two_sources=True, some_heads=True)


def causal(world_size, able=HEADS_APART, kv_heads=8, batch=1, intra_node=True):
    geometry = Geometry.of_sequence(df.Causal(), df.Zigzag(), 20 * world_size, world_size)
    return overlap(df.Ring().plan(geometry, 0), kv_heads, batch, able, intra_node)


def heads_of(stages):
    return [(each.sources, each.heads, each.begun) for stage in stages for each in stage.passes]


def test_most_heads_wait_for_the_first_keys_and_go_back_to_their_own_at_the_end():
    plan = causal(2)
    assert heads_of(plan.forward) == [((0,), range(2), 0), ((0, 1), None, 2)]
    assert heads_of(plan.backward) == [((0,), range(2), 0), ((1,), None, 0), ((0,), range(2, 8), 0)]


@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_gradients_that_come_home_early_are_not_overwritten(world_size):
    plan = causal(world_size)
    assert heads_of(plan.forward)[:2] == [((0,), range(2), 0), ((0, world_size - 1), None, 2)]
    assert all(heads is None for _, heads, _ in heads_of(plan.backward))


@pytest.mark.parametrize(
    "changed",
    [
        dict(intra_node=False),
        dict(kv_heads=1),
        dict(able=Abilities(two_sources=True)),
        dict(able=Abilities(some_heads=True)),
    ],
    ids=["far", "one head", "no heads apart", "one source at a time"],
)
def test_no_head_is_held_back(changed):
    plan = causal(2, **changed)
    assert all(heads is None and not begun for _, heads, begun in heads_of((*plan.forward, *plan.backward)))


def test_no_head_is_held_back_in_backward_where_there_is_little_work():
    """Two heads of 20 keys each."""
    able = Abilities(two_sources=True, some_heads=True, smallest_work=41)
    plan = causal(2, able)
    assert heads_of(plan.forward)[0] == ((0,), range(2), 0)
    assert all(heads is None for _, heads, _ in heads_of(plan.backward))
    assert heads_of(causal(2, able, batch=3).backward)[0] == ((0,), range(2), 0)


def test_the_parts_of_a_union_are_one_pass():
    geometry = Geometry.of_sequence(df.Causal() & (df.Window(3) | df.FirstTokens(2)), df.Contiguous(), 16, 1)
    plan = df.Ring().plan(geometry, 0)
    assert [each.sources for each in plan.passes] == [(0,), (0,)]
    (both,) = overlap(plan, 1, 1, Abilities(two_sources=True), True).passes
    assert both.sources == (0, 0) and both.first and both.last and both.pairs == int(plan.pairs.sum())


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_where_queries_travel_the_last_dq_does_while_keys_get_their_gradients(world_size):
    geometry = Geometry.of_sequence(df.Causal(), df.Zigzag(), 20 * world_size, world_size)
    for rank in range(world_size):
        plan = overlap(df.PassQuery().plan(geometry, rank), 8, 1, Abilities(separate_gradients=True), True)
        *_, before, last = plan.backward
        assert before.passes[-1].gradients is Gradients.OF_QUERIES
        assert [each.gradients for each in last.passes] == [Gradients.OF_KEYS] and last.passes[0].adds
        assert {t.what for t in last.transfers} == {What.QUERY_GRADIENTS}


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_no_head_is_held_back_where_others_queries_add_to_the_gradients_of_keys(world_size):
    geometry = Geometry.of_sequence(df.Full(), df.Zigzag(), 20 * world_size, world_size)
    plan = overlap(df.PassQuery().plan(geometry, 0), 8, 1, HEADS_APART, True)
    assert all(heads is None and not begun for _, heads, begun in heads_of((*plan.forward, *plan.backward)))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_last_gradients_travel_while_queries_get_theirs(world_size):
    plan = causal(world_size, Abilities(separate_gradients=True))
    *_, before, last = plan.backward
    assert before.passes[-1].gradients is Gradients.OF_KEYS
    assert [each.gradients for each in last.passes] == [Gradients.OF_QUERIES] and last.transfers
    assert replace(last.passes[0], gradients=Gradients.ALL, visible=()).last


@pytest.mark.parametrize("schedule", [df.Ring(), df.AllGather(), df.PassQuery()], ids=repr)
def test_a_kernel_that_adds_in_an_order_finds_it_in_the_passes_of_backward(schedule):
    geometry = Geometry.of_sequence(df.Causal() & (df.Window(30) | df.FirstTokens(9)), df.Zigzag(), 120, 3)
    plan = overlap(schedule.plan(geometry, 1), 2, 1, Abilities(two_sources=True, ordered_blocks=(16, 8)), True)
    assert all(each.turns is None for each in plan.passes)
    assert len(plan.backward_passes) > 1
    for each in plan.backward_passes:
        expected = turns_of(each.visible[0], 16, 8)
        assert torch.equal(each.turns.earlier, expected.earlier) and torch.equal(each.turns.ended, expected.ended)
    moved = plan.to(torch.device("meta"))  # as the plan's other tables are
    assert all(each.turns.earlier.is_meta and each.turns.ended.is_meta for each in moved.backward_passes)
    others = overlap(schedule.plan(geometry, 1), 2, 1, Abilities(two_sources=True), True)
    assert all(each.turns is None for each in (*others.passes, *others.backward_passes))
