"""Plans of `Reproducible`, as data, and errors."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.chunkwise_plan import ChunkwisePlan
from distflash.geometry import Geometry
from distflash.plan import Gradients, What
from distflash.transport import Simulator
from tests.dense import make_inputs, on_rank
from tests.strategies import examples, masks, problems

INNER = st.sampled_from([df.Zigzag(), df.Contiguous(), df.Striped()])


@st.composite
def calls(draw):
    seq_len, chunk, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    geometry = Geometry.of_sequence(draw(masks(seq_len)), df.WholeChunks(draw(INNER), chunk), seq_len, ranks)
    return geometry, [df.Reproducible(chunk).plan(geometry, rank) for rank in range(ranks)]


@examples(40)
@given(calls())
def test_what_one_rank_sends_another_receives(call):
    _, plans = call
    for stages in ([plan.forward for plan in plans], [plan.backward for plan in plans]):
        assert len({*map(len, stages)}) == 1
        sent, received = Counter(), Counter()
        for rank, of_rank in enumerate(stages):
            for number, stage in enumerate(of_rank):
                for t in stage.transfers:
                    ends = (rank, t.peer) if t.sends else (t.peer, rank)
                    (sent if t.sends else received)[ends, number, t.until, t.what, t.of, t.count] += 1
                    assert number < t.until < len(of_rank) and rank != t.peer
        assert sent == received


@examples(40)
@given(calls())
def test_every_pair_is_computed_once_for_each_result(call):
    """Forward, for dQ by the rank that holds the query, and for dK and dV by the one that holds the key."""
    geometry, plans = call
    S = geometry.seq_len
    positions = torch.arange(S)
    visible = geometry.mask.materialize(positions, positions, S).reshape(S, S).int()
    for gradients in (Gradients.ALL, Gradients.OF_QUERIES, Gradients.OF_KEYS):
        count = torch.zeros(S, S, dtype=torch.int32)
        for rank, plan in enumerate(plans):
            held = geometry.queries.positions(rank)
            for piece in plan.of_keys if gradients is Gradients.OF_KEYS else plan.of_queries:
                for each in plan.passes_over(piece, gradients):
                    (rows,) = each.visible
                    own = rows.k_positions if gradients is Gradients.OF_KEYS else rows.q_positions
                    assert torch.isin(own, held[piece.own.start : piece.own.stop]).all()
                    for n, query in enumerate(rows.q_positions.tolist()):
                        count[query, rows.k_positions[rows.row_lo[n] : rows.row_hi[n]].long()] += 1
        assert torch.equal(count, visible), gradients


@examples(20)
@given(problems(), INNER, st.integers(1, 6), st.integers(1, 20))
def test_a_plan_tells_the_bytes_that_travel(p, inner, W, chunk):
    """But for the gradient of sinks: ``[H]`` numbers a chunk of another rank than the first."""
    simulator, x = Simulator(W), make_inputs(p)

    def work(transport):
        cp = df.ContextParallel(transport, df.WholeChunks(inner, chunk), df.Reproducible(chunk))
        on_rank(p, x, cp)
        return cp.plan(p.mask, p.seq_len)

    plans = simulator.run(work)
    shape = p.heads, p.kv_heads, p.d_qk, p.d_v, p.dtype
    expected = p.batch * sum(plan.bytes(*shape, backward=backward) for plan in plans for backward in (False, True))
    if p.sinks:
        expected += sum(owner > 0 for owner in plans[0].owners) * p.heads * 8
    assert simulator.traffic.bytes == expected


def test_a_window_has_only_chunks_within_it_sent():
    geometry = Geometry.of_sequence(df.Causal() & df.Window(7), df.Contiguous(), 64, 4)
    plans = [df.Reproducible(8).plan(geometry, rank) for rank in range(4)]
    assert [plan.moved(What.KEYS) for plan in plans] == [0, 8, 8, 8]
    assert [plan.sources for plan in plans] == [(0,), (0, 1), (1, 2), (2, 3)]
    assert [plan.moved(What.QUERIES, backward=True) for plan in plans] == [8, 8, 8, 0]


def test_a_layout_that_loses_tokens_is_told_so():
    class Loses(df.Layout):
        def ranges(self, seq_len, world_size, rank):
            return (range(rank * 8, rank * 8 + 8),)

    with pytest.raises(ValueError, match="expected ascending ranges that hold each of the 32 positions once"):
        df.Reproducible(8).plan(Geometry.of_sequence(df.Causal(), Loses(), 32, 2), 0)


def test_a_plan_prints_its_chunks():
    geometry = Geometry.of_sequence(df.Causal(), df.Contiguous(), 16, 2)
    assert str(df.Reproducible(4).plan(geometry, 1)).splitlines()[2:] == [
        "remote keys, by rank: 0, 8 (each: k and v of one token)",
        "forward    computes                                  meanwhile",
        "  stage 0  -                                         receive keys of 0 (8) from 0",
        "  stage 1  chunk 2 over 12 keys: 42 pairs            -",
        "           chunk 3 over 16 keys: 58 pairs",
        "backward   computes                                  meanwhile",
        "  stage 0  -                                         receive keys of 0 (8) from 0",
        "                                                     send queries of 1 (8) to 0",
        "  stage 1  chunk 2 over 12 keys: 42 pairs, dQ        -",
        "           chunk 3 over 16 keys: 58 pairs, dQ",
        "           8 queries over chunk 2: 26 pairs, dK, dV",
        "           4 queries over chunk 3: 10 pairs, dK, dV",
    ]


ALONE = df.transport.Alone()


def test_the_switch_is_short_for_the_schedule():
    assert df.ContextParallel(ALONE, reproducible=True).schedule == df.Reproducible(512)
    assert df.ContextParallel(ALONE, schedule=df.Reproducible(64), reproducible=True).schedule == df.Reproducible(64)
    assert df.ContextParallel(ALONE).schedule == df.Ring()
    assert isinstance(df.ContextParallel(ALONE, reproducible=True).plan(df.Causal(), 9), ChunkwisePlan)


WRONG = {
    "a chunk in place of the switch": (
        lambda: df.ContextParallel(ALONE, reproducible=512),
        r"reproducible: expected True or False, got 512.*schedule=df.Reproducible\(chunk\)",
    ),
    "another schedule beside it": (
        lambda: df.ContextParallel(ALONE, schedule=df.AllGather(), reproducible=True),
        r"reproducible: True stands for schedule=df.Reproducible\(\), but schedule=AllGather",
    ),
    "no tokens in a chunk": (lambda: df.Reproducible(0), r"Reproducible\(chunk\): expected an int of at least 1"),
    "heads that are split": (lambda: df.Ulysses(df.Reproducible()), r"Ulysses\(inner\): .* number of ranks"),
    "a cache": (
        lambda: df.Cache(df.ContextParallel(ALONE, reproducible=True), batch=1, kv_heads=1, d_qk=8, capacity=8),
        "cp: a cache keeps keys where there is room",
    ),
    "a kernel that adds in any order": (
        lambda: df.attention(
            *torch.randn(3, 1, 8, 1, 16), cp=df.ContextParallel(ALONE, kernel=df.kernels.Hopper(), reproducible=True)
        ),
        r"kernel: Hopper\(.*Hopper\(deterministic=True\), or kernel=None",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_is_refused_with(what):
    call, words = WRONG[what]
    with pytest.raises(ValueError, match=words):
        call()


def test_layouts_that_cut_chunks_are_refused_on_every_rank():
    def work(transport):
        cp = df.ContextParallel(transport, reproducible=True)
        q = torch.randn(1, 300, 1, 8)
        with pytest.raises(ValueError, match=r"layout: .*df.WholeChunks\(df.Zigzag\(\), 512\)"):
            df.attention(q, q, q, mask=df.Causal(), cp=cp)

    Simulator(2).run(work)


def test_ranks_with_other_chunks_are_told():
    def work(transport):
        chunk = 4 + transport.rank
        cp = df.ContextParallel(transport, df.WholeChunks(df.Contiguous(), 20), df.Reproducible(chunk))
        q = torch.randn(1, 20, 1, 8)
        with pytest.raises(ValueError, match="disagree about the attention forward of call 1: schedule differs"):
            df.attention(q, q, q, cp=cp)

    Simulator(2).run(work)
