"""Plans of schedules that send keys: transfers, passes, and bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.geometry import Geometry, Needs, Sharded
from distflash.plan import What
from distflash.schedules.travel import KeysTravel, among, contains
from tests.plans import check
from tests.strategies import examples, geometries, schedules


def plans_of(schedule, geometry):
    return [schedule.plan(geometry, rank) for rank in range(geometry.world_size)]


@examples(80)
@given(geometries(), schedules)
def test_plans_compute_every_pair_once_and_nothing_is_lost_on_the_way(geometry, schedule):
    check(plans_of(schedule, geometry), geometry, kv_heads=2)


@examples(60)
@given(geometries(), schedules.filter(lambda schedule: isinstance(schedule, KeysTravel)))
def test_what_moves_is_what_is_needed(geometry, schedule):
    """Each rank receives the keys that it sees, once, and sends their gradients back."""
    needs = Needs.of(geometry)
    for rank, plan in enumerate(plans_of(schedule, geometry)):
        needed = sum(len(r) for source, rows in enumerate(needs.rows[rank]) if source != rank for r in rows)
        assert plan.moved(What.KEYS) == plan.moved(What.KEYS, backward=True) == needed
        returned = sum(len(r) for other, of in enumerate(needs.rows) if other != rank for r in of[rank])
        assert plan.moved(What.KEY_GRADIENTS, backward=True) == returned


def ranges_of(marks):
    """The ascending ranges of a set of indices."""
    ends = torch.tensor([0, *marks, 0]).diff().nonzero().flatten().tolist()
    return tuple(map(range, ends[::2], ends[1::2]))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_keys_are_found_among_those_that_a_rank_holds(marks):
    held, wanted = ranges_of([int(h) for h, _ in marks]), ranges_of([int(w) for _, w in marks])
    tokens = [n for run in held for n in run]
    assert contains(held, wanted) == all(h or not w for h, w in marks)
    inside = ranges_of([int(h and w) for h, w in marks])
    found = among(inside, held)
    assert [tokens[n] for run in (ranges_of([1] * len(tokens)) if found is None else found) for n in run] == [
        n for run in inside for n in run
    ]


def seen_of(geometry, rank, source):
    positions = geometry.queries.positions(rank), geometry.keys.positions(source)
    return geometry.mask.materialize(*positions, geometry.seq_len).any(0)


@given(geometries())
def test_needed_rows_are_those_that_are_seen(geometry):
    needs = Needs.of(geometry)
    for rank in range(geometry.world_size):
        for source in range(geometry.world_size):
            rows, seen = needs.rows[rank][source], seen_of(geometry, rank, source)
            taken = torch.zeros_like(seen)
            for r in rows:
                taken[r.start : r.stop] = True
            assert (taken >= seen).all()
            # Gaps that are not worth a copy are filled in.
            assert (taken & ~seen).sum() <= sum(map(len, rows)) / 50


@pytest.mark.parametrize("schedule", [df.Ring(), df.AllGather(1), df.AllGather(3)], ids=repr)
@pytest.mark.parametrize("W", [1, 2, 4, 8])
def test_a_full_mask_moves_all_keys_to_all_ranks(W, schedule):
    geometry = Geometry.of_sequence(df.Full(), df.Zigzag(), 16 * W, W)
    plans = plans_of(schedule, geometry)
    assert [plan.moved(What.KEYS) for plan in plans] == [16 * (W - 1)] * W
    exchanges = {df.Ring(): W - 1}.get(schedule, min(getattr(schedule, "chunks", 0), W - 1))
    assert [plan.exchanges for plan in plans] == [exchanges] * W


@pytest.mark.parametrize("W", [2, 4, 8])
def test_a_causal_zigzag_ring_moves_three_quarters(W):
    """Of a source before it a rank sees the early chunk only: half of the keys."""
    geometry = Geometry.of_sequence(df.Causal(), df.Zigzag(), 16 * W, W)
    for rank, plan in enumerate(plans_of(df.Ring(), geometry)):
        before, after = rank, W - 1 - rank
        assert plan.moved(What.KEYS) == 8 * before + 16 * after


@pytest.mark.parametrize("W", [2, 3, 4, 8])
def test_a_window_moves_a_halo(W):
    geometry = Geometry.of_sequence(df.Window(9, 0), df.Contiguous(), 64 * W, W)
    moved = [plan.moved(What.KEYS) for plan in plans_of(df.Ring(), geometry)]
    assert moved == [0] + [9] * (W - 1)


@pytest.mark.parametrize(("mask", "most"), [(df.Window(4095, 0), 1.0), ("documents", 1.05)], ids=repr)
@pytest.mark.parametrize("layout", [df.Zigzag(), df.Contiguous(), df.Striped()], ids=repr)
@pytest.mark.parametrize("W", [2, 4, 8, 64])
def test_bytes_moved_over_needed_at_128k(W, layout, mask, most):
    S = 2**17
    if mask == "documents":
        random = torch.Generator().manual_seed(0)
        cuts = torch.randint(1, S, (31,), generator=random).unique().tolist()
        mask = df.Causal() & df.Documents([0, *cuts, S])
    geometry = Geometry.of_sequence(mask, layout, S, W)
    needs = Needs.of(geometry)
    needed = moved = 0
    for rank in {0, 1, W // 2, W - 1}:
        plan_rows = [sum(map(len, rows)) for source, rows in enumerate(needs.rows[rank]) if source != rank]
        moved += sum(plan_rows)
        for source in range(W):
            if source == rank:
                continue
            at = torch.zeros(geometry.keys.length(source) + 1, dtype=torch.int64)
            for ends in geometry.parts(rank):
                lo, hi = geometry.local(ends, source)
                some = hi > lo
                at.index_add_(0, lo[some], torch.ones_like(lo[some]))
                at.index_add_(0, hi[some], -torch.ones_like(hi[some]))
            needed += int((at.cumsum(0) > 0).sum())
    assert needed <= moved <= most * needed


@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 8), st.sampled_from([df.Contiguous(), df.Zigzag()]))
def test_queries_that_are_a_part_of_the_tokens(seq_len, start, world_size, layout):
    start = min(start, seq_len)
    queries = Sharded(layout, seq_len - start, world_size, start)
    geometry = Geometry(df.Causal(), queries, Sharded(df.Zigzag(), seq_len, world_size), seq_len)
    check(plans_of(df.Ring(), geometry), geometry, kv_heads=1)


def test_a_plan_is_a_table():
    geometry = Geometry.of_sequence(df.Causal(), df.Contiguous(), 8, 2)
    assert str(df.Ring().plan(geometry, 1)) == "\n".join(
        [
            "Plan of rank 1 of 2: 26 allowed pairs",
            "percent of all pairs, by rank: 27.8, 72.2",
            "remote keys, by rank: 0, 4 (each: k and v of one token)",
            "forward    computes                         meanwhile",
            "  stage 0  keys of 1[0:4]: 10 pairs, first  receive keys of 0 (4) from 0",
            "  stage 1  keys of 0[0:4]: 16 pairs, last   -",
            "backward   computes                         meanwhile",
            "  stage 0  keys of 1[0:4]: 10 pairs, first  receive keys of 0 (4) from 0",
            "  stage 1  keys of 0[0:4]: 16 pairs, last   -",
            "  stage 2  -                                send dK, dV of 0 (4) to 0",
        ]
    )
