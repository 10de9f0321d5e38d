"""PassQuery: transfers, bytes, and lifetime of buffers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.exchange import Exchange
from distflash.geometry import Geometry, Needs, Sharded
from distflash.plan import What
from tests.dense import Problem, make_inputs, on_rank
from tests.strategies import SCHEDULES, examples, geometries, layouts, problems

SHAPE = dict(heads=8, kv_heads=2, d_qk=16, d_v=12)


def plans_of(geometry, schedule=None):
    schedule = schedule or df.PassQuery()
    return [schedule.plan(geometry, rank) for rank in range(geometry.world_size)]


def sequence(mask, layout, seq_len, W):
    return Geometry.of_sequence(mask, layout, seq_len, W)


@examples(60)
@given(geometries())
def test_queries_go_to_those_ranks_of_whose_keys_they_see_any(geometry):
    needs, ranks = Needs.of(geometry), range(geometry.world_size)
    for rank, plan in enumerate(plans_of(geometry)):
        lengths = [geometry.queries.length(r) for r in ranks]
        guests = sum(lengths[r] for r in ranks if r != rank and needs.any_pair(r, rank))
        hosts = sum(lengths[rank] for r in ranks if r != rank and needs.any_pair(rank, r))
        for backward, returned in ((False, What.PARTIALS), (True, What.QUERY_GRADIENTS)):
            assert plan.moved(What.QUERIES, backward) == guests
            assert plan.moved(returned, backward) == hosts
            assert plan.moved(What.KEYS, backward) == plan.moved(What.KEY_GRADIENTS, backward) == 0
        assert plan.merges == bool(hosts) and plan.moves_queries == bool(hosts or guests)


@pytest.mark.parametrize("W", [1, 2, 3, 8, 16])
def test_bytes_of_a_full_mask(W):
    """``T H D`` there and ``T H (V + 2)`` float32 back; backward out, lse and their gradients too, and dQ back."""
    T, H, D, V = 16, SHAPE["heads"], SHAPE["d_qk"], SHAPE["d_v"]
    for plan in plans_of(sequence(df.Full(), df.Zigzag(), T * W, W)):
        there_and_back = T * H * (D * 2 + (V + 2) * 4)
        assert plan.bytes(**SHAPE, dtype=torch.bfloat16) == (W - 1) * there_and_back
        there_and_back = T * H * ((D + 2 * V) * 2 + 2 * 4 + D * 4)
        assert plan.bytes(**SHAPE, dtype=torch.bfloat16, backward=True) == (W - 1) * there_and_back


@examples(30)
@given(problems(), layouts, st.integers(1, 6), st.sampled_from(SCHEDULES))
def test_a_plan_tells_the_bytes_that_travel(p, layout, W, schedule):
    simulator = df.transport.Simulator(W)
    x = make_inputs(p)

    def work(transport):
        cp = df.ContextParallel(transport, layout, schedule, df.kernels.Reference())
        on_rank(p, x, cp)
        return cp.plan(p.mask, p.seq_len)

    plans = simulator.run(work)
    shape = p.heads, p.kv_heads, p.d_qk, p.d_v, p.dtype
    expected = sum(plan.bytes(*shape, backward=backward) for plan in plans for backward in (False, True))
    assert simulator.traffic.bytes == p.batch * expected


def received(schedule, queries, keys, heads, kv_heads, W=4):
    """Bytes that all ranks receive in forward: full attention of some queries over all keys, in bfloat16."""
    of_keys = Sharded(df.Contiguous(), keys, W)
    geometry = Geometry(df.Full(), Sharded(df.Contiguous(), queries, W), of_keys, keys)
    return sum(plan.bytes(heads, kv_heads, 128, 128, torch.bfloat16) for plan in plans_of(geometry, schedule))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (32, 4)])
def test_when_fewer_bytes_travel_than_in_a_ring(heads, kv_heads):
    """Queries below 2 G / 3 H of the keys, as `PassQuery` says, less 1% for the maxima and totals of the states."""
    keys = 12000
    at = keys * 2 * kv_heads // (3 * heads)
    for queries, less in ((at * 95 // 100, True), (at, False)):
        moved = [received(schedule, queries, keys, heads, kv_heads) for schedule in (df.PassQuery(), df.Ring())]
        assert (moved[0] < moved[1]) == less


@pytest.mark.parametrize("W", [2, 3, 4, 8])
def test_in_every_step_all_ranks_have_as_much_to_do(W):
    """Under a causal mask in zigzag, as in a ring."""
    plans = plans_of(sequence(df.Causal(), df.Zigzag(), 16 * W, W))
    for stages in zip(*(plan.forward[1:-1] for plan in plans), strict=True):
        pairs = [sum(each.pairs for each in stage.passes) for stage in stages]
        assert max(pairs) == min(pairs) > 0


def test_documents_within_shards_send_nothing_and_round_at_once():
    for plan in plans_of(sequence(df.Documents(range(0, 65, 8)), df.Contiguous(), 64, 8)):
        assert not plan.moves_queries and not plan.keeps_partials
        assert len(plan.forward) == len(plan.backward) == 1


@pytest.mark.parametrize("W", [3, 8])
def test_buffers_of_other_ranks_are_let_go_of(W, monkeypatch):
    """Queries of two others at most are at hand or arriving, and the state of one of them beside that under way."""
    most = []
    walk = Exchange.walk

    def watched(self, stages, done_with):
        for stage in walk(self, stages, done_with):
            yield stage
            others = [name for name in {*self.tensors, *self.derived} if name[1] != self.plan.rank]
            most.append(max([sum(name[0] is what for name in others) for what in What]))
        assert all(name[1] == self.plan.rank for name in {*self.tensors, *self.derived})

    monkeypatch.setattr(Exchange, "walk", watched)
    p = Problem(df.Full(), seq_len=48, heads=4, kv_heads=2, sinks=True)
    x = make_inputs(p)
    df.transport.Simulator(W).run(lambda t: on_rank(p, x, df.ContextParallel(t, schedule=df.PassQuery())))
    assert max(most) == 1


def test_a_plan_is_a_table():
    geometry = sequence(df.Causal(), df.Contiguous(), 8, 2)
    assert str(df.PassQuery().plan(geometry, 0)) == "\n".join(
        [
            "Plan of rank 0 of 2: 10 allowed pairs",
            "percent of all pairs, by rank: 27.8, 72.2",
            "remote keys, by rank: 0, 4 (each: k and v of one token)",
            "forward    computes                                                   meanwhile",
            "  stage 0  keys of 0[0:4]: 10 pairs, first, last                      receive queries of 1 (4) from 1",
            "  stage 1  queries of 1, keys of 0[0:4]: 16 pairs, first, adds        -",
            "  stage 2  -                                                          send partial states of 1 (4) to 1",
            "backward   computes                                                   meanwhile",
            "  stage 0  keys of 0[0:4]: 10 pairs, first, last                      receive queries of 1 (4) from 1",
            "  stage 1  queries of 1, keys of 0[0:4]: 16 pairs, first, last, adds  -",
            "  stage 2  -                                                          send dQ of 1 (4) to 1",
        ]
    )
