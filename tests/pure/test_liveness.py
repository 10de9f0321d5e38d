"""Live rows: which rows passes skip, and that results stay exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash import liveness
from distflash.geometry import Geometry
from distflash.kernels import Reference, reference
from distflash.kernels.base import Abilities
from distflash.overlap import overlap
from tests import oracle
from tests.dense import assert_exact, make_inputs, on_ranks
from tests.plans import check
from tests.strategies import examples, geometries, layouts, problems, schedules

ABLE = Abilities(two_sources=True, some_heads=True)
PLAIN = Abilities()


@pytest.fixture(scope="module", autouse=True)
def small_groups():
    """Groups so small that short sequences have many."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (liveness, reference):
            patch.setattr(module, "GROUP_ROWS", 4)
        yield


@examples(100)
@given(geometries(), schedules, st.integers(1, 8), st.sampled_from([ABLE, PLAIN]), st.booleans())
def test_rows_are_live_where_they_see_a_key(geometry, schedule, kv_heads, able, intra_node):
    plans = [schedule.plan(geometry, rank) for rank in range(geometry.world_size)]
    check([overlap(plan, kv_heads, 1, able, intra_node) for plan in plans], geometry, kv_heads)


@examples(50)
@given(problems(), layouts, st.integers(2, 8))
def test_exact_in_float64(p, layout, world_size):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, Reference(block_q=3, block_k=7)))


@pytest.mark.parametrize("held_back", [0, 1])
@pytest.mark.parametrize("case", [*oracle.window_rings(3, 30), *oracle.window_rings(8, 17)], ids=lambda c: c.name)
def test_windows(case, held_back):
    oracle.check(Reference(block_q=3, block_k=7), case, held_back=held_back)
    oracle.check(Reference(block_q=3, block_k=7), case, held_back=held_back, live=False)


def plan_of(mask, able, layout, rank=1, world_size=4, tokens=16):
    geometry = Geometry.of_sequence(mask, layout, tokens * world_size, world_size)
    return overlap(df.Ring().plan(geometry, rank), 4, 1, able, True)


def live(plan):
    return [each.live and each.live.groups.tolist() for each in plan.passes]


START, GO_ON, END, ONLY = 3, 1, 5, 7  # flags of a group in its first pass, a later one, its last one, its only one


def test_a_window_has_done_with_most_rows_in_the_first_pass():
    """Of 16 rows the first 4 see keys of the rank before."""
    own, before = live(plan_of(df.Window(4, 0), PLAIN, df.Contiguous()))
    assert own == [[0, START], [4, ONLY], [8, ONLY], [12, ONLY]]
    assert before == [[0, END]]


def test_heads_that_have_begun_are_in_fewer_rows():
    first, both = live(plan_of(df.Window(4, 0), ABLE, df.Contiguous()))
    assert first == [[0, START], [4, ONLY], [8, ONLY], [12, ONLY]]
    assert both == [[0, ONLY | END << 3], [4, ONLY], [8, ONLY], [12, ONLY]]


def test_early_queries_of_a_causal_zigzag_end_early():
    """Rank 0 of 2 has the first and the last quarter; the first sees no key of rank 1."""
    own, other = live(plan_of(df.Causal(), PLAIN, df.Zigzag(), rank=0, world_size=2))
    assert own == [[0, ONLY], [4, ONLY], [8, START], [12, START]]
    assert other == [[8, END], [12, END]]


def test_nothing_is_listed_where_all_rows_are_in_all_passes():
    assert live(plan_of(df.Full(), PLAIN, df.Contiguous())) == [None] * 4
    assert live(plan_of(df.Full(), ABLE, df.Contiguous())) == [None] * 4
    assert live(plan_of(df.Window(4, 0), ABLE, df.Contiguous(), rank=0, world_size=1)) == [None]


def test_rows_that_see_no_key_start_and_end_in_the_first_pass():
    own, before = live(plan_of(df.Window(4, 0) & oracle.Blind(20, 24), PLAIN, df.Contiguous()))
    assert own[1] == [4, ONLY] and [4] not in [group[:1] for group in before or []]


def test_states_that_travel_are_of_all_rows():
    geometry = Geometry.of_sequence(df.Window(4, 0), df.Contiguous(), 64, 4)
    assert live(overlap(df.PassQuery().plan(geometry, 1), 4, 1, PLAIN, True)) == [None] * 2


def test_the_last_group_may_be_short_and_moves_with_its_pass():
    plan = plan_of(df.Window(4, 0), PLAIN, df.Contiguous(), tokens=10)
    own, before = plan.to(torch.device("meta")).passes
    assert (own.live.count, before.live.count) == (10, 4)
    assert own.live.groups.device.type == "meta"
