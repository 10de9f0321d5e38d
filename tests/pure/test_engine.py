"""Exactness: forward, lse and all gradients against dense float64, over masks, layouts, lengths, shapes and ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from tests.dense import (
    Inputs,
    Problem,
    assert_exact,
    assert_no_less_exact,
    in_dtype,
    join,
    make_inputs,
    on_rank,
    on_ranks,
    relative_errors,
)
from tests.oracle import Blind
from tests.strategies import examples, layouts, problems, schedules

# Tiles so small that short sequences have empty, full and cut ones.
SMALL_TILES = df.kernels.Reference(block_q=5, block_k=7)


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()


@examples(80)
@given(problems(), layouts, st.integers(1, 8), schedules)
def test_exact_in_float64(p, layout, world_size, schedule):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, SMALL_TILES, schedule))


def mask_of(name, seq_len):
    return {
        "causal": df.Causal(),
        "window of packed documents": df.Window(20, 4) & df.Documents([0, 3, seq_len // 3, seq_len]),
        "union": df.Causal() & (df.Window(9) | df.FirstTokens(2)) | Blind(seq_len // 3, seq_len // 2),
    }[name]


SCHEDULES = [df.Ring(), df.AllGather(), df.DoubleRing(4), df.PassQuery()]
LAYOUT_AND_MASK = [(df.Zigzag(), "causal"), (df.Striped(), "union"), (df.Contiguous(), "window of packed documents")]


# Of 37 tokens each of 16 ranks has two or three.
@pytest.mark.slow  # all of them together
@pytest.mark.covering(2, schedule=SCHEDULES, layout_and_mask=LAYOUT_AND_MASK, seq_len=[131, 37])
def test_exact_on_many_ranks(schedule, layout_and_mask, seq_len):
    assert_exact_on(16, schedule, *layout_and_mask, seq_len)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_exact_on_32_ranks(schedule):
    assert_exact_on(32, schedule, df.Zigzag(), "window of packed documents", 67)


def assert_exact_on(world_size, schedule, layout, mask, seq_len):
    p = Problem(mask_of(mask, seq_len), seq_len, heads=2, d_v=5, softcap=3.0, alibi=True, sinks=True)
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, schedule=schedule))


@pytest.mark.parametrize(
    ("mask", "layout", "world_size"),
    [
        (df.Causal(), df.Contiguous(), 3),
        (df.Causal() & df.Documents([0, 7, 8, 33, 48]), df.Zigzag(), 5),
        (df.Window(6, 0), df.Zigzag(), 4),
        (df.Window(6, 0), df.Contiguous(), 8),
    ],
    ids=repr,
)
def test_exact_where_one_part_comes_home_before_the_last_step(mask, layout, world_size):
    """Where heads were held back all the same, they overwrote that part."""
    p = Problem(mask, seq_len=48, heads=8, kv_heads=8)
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout))


@examples(30)
@given(problems(), layouts, st.integers(2, 8), schedules, st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_less_exact_than_one_rank(p, layout, world_size, schedule, dtype):
    p = in_dtype(p, dtype)
    x = make_inputs(p)
    one_rank = on_ranks(p, x, 1, layout)
    assert_no_less_exact(p, x, on_ranks(p, x, world_size, layout, schedule=schedule), one_rank)


@pytest.mark.parametrize("schedule", [df.Ring(), df.PassQuery()], ids=repr)
@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_of_keys_are_rounded_once(world_size, schedule):
    """Of the parts of a union, and of several ranks' queries: dV in bfloat16 is that in float32, rounded."""
    mask = df.Window(9) | df.FirstTokens(20) | df.PrefixLM(3)
    p = Problem(mask, 61, heads=4, kv_heads=2, dtype=torch.bfloat16)
    short = make_inputs(p)
    wide = Inputs(*(None if x is None else x.float() for x in vars(short).values()))
    dv = [on_ranks(p, x, world_size, df.Zigzag(), schedule=schedule)["dv"] for x in (short, wide)]
    assert torch.equal(dv[0], dv[1].bfloat16())


@pytest.fixture(scope="module")
def long_problem():
    """Long enough for 64 ranks, and the whole of it on one of them; by dtype."""

    def solve(dtype):
        p = Problem(seq_len=512, d_qk=32, d_v=32, sinks=True, dtype=dtype)
        x = make_inputs(p)
        return p, x, on_ranks(p, x, 1, df.Contiguous())

    return {dtype: solve(dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.slow
@pytest.mark.covering(1, world_size=[2, 8, 64], dtype=[torch.float32, torch.bfloat16])
def test_error_stays_flat_however_many_ranks(world_size, dtype, long_problem):
    p, x, one_rank = long_problem[dtype]
    got = on_ranks(p, x, world_size, df.Zigzag())
    assert_no_less_exact(p, x, got, one_rank)
    # So many tokens need no floor.
    errors, bar = relative_errors(p, x, got), relative_errors(p, x, one_rank)
    assert all(errors[name] <= 1.1 * bar[name] for name in ("out", "dq", "dk", "dv"))


@pytest.mark.covering(
    2,
    world_size=[1, 3],
    layout=[df.Contiguous(), df.Zigzag(), df.Striped()],
    dtype=[torch.float64, torch.bfloat16],
    schedule=[df.Ring(), df.PassQuery()],
)
def test_queries_that_see_nothing(schedule, dtype, layout, world_size):
    """Exact zeros, lse -inf, no gradient to anything and no NaN, though lse is given a gradient too."""
    mask = Blind(5, 17) & df.Window(6, 2)
    p = Problem(mask, seq_len=29, batch=2, dtype=dtype)
    got = on_ranks(p, make_inputs(p), world_size, layout, SMALL_TILES, schedule)
    positions = torch.arange(p.seq_len)
    visible = mask.materialize(positions, positions)
    blind, unseen = ~visible.any(1), ~visible.any(0)
    assert blind.sum() == 12 and unseen.any()
    assert (got["out"][:, blind] == 0).all()
    assert (got["lse"][:, :, blind] == -torch.inf).all()
    assert got["lse"][:, :, ~blind].isfinite().all()
    assert (got["dq"][:, blind] == 0).all()
    assert (got["dk"][:, unseen] == 0).all() and (got["dv"][:, unseen] == 0).all()
    assert all(got[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("sink", [0.5, -torch.inf])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("schedule", [df.Ring(), df.PassQuery()], ids=repr)
def test_sinks_where_nothing_is_seen(schedule, world_size, sink):
    """All of the softmax is the sink's; one of -inf is no sink at all."""
    p = Problem(Blind(0, 8), seq_len=8, sinks=True)
    x = make_inputs(p)
    x.sinks.fill_(sink)
    got = on_ranks(p, x, world_size, df.Contiguous(), schedule=schedule)
    assert (got["out"] == 0).all() and (got["lse"] == sink).all()
    # lse is the sink itself, so its gradient is the sink's.
    expected = x.dlse.sum((0, 2)) if sink > -torch.inf else torch.zeros(p.heads)
    torch.testing.assert_close(got["dsinks"], expected.to(got["dsinks"].dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.covering(
    2,
    seq_len=[0, 1, 3, 5],
    layout=[df.Contiguous(), df.Zigzag(), df.Striped()],
    schedule=[df.Ring(), df.DoubleRing(3), df.PassQuery()],
)
def test_more_ranks_than_tokens(schedule, layout, seq_len):
    p = Problem(seq_len=seq_len, sinks=True)
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, 6, layout, schedule=schedule))


@pytest.mark.parametrize("schedule", [df.Ring(), df.PassQuery()], ids=repr)
def test_a_batch_of_none_sends_nothing(schedule):
    p = Problem(seq_len=6, batch=0, heads=4, kv_heads=2, d_v=5, sinks=True)
    x = make_inputs(p)
    simulator = df.transport.Simulator(2)
    parts = simulator.run(lambda t: on_rank(p, x, df.ContextParallel(t, df.Zigzag(), schedule, df.kernels.Reference())))
    assert simulator.traffic.messages == 0
    assert_exact(p, x, join(parts, df.Zigzag(), p.seq_len))


def test_strides_do_not_matter():
    """q, k and v as slices of one projection with heads before tokens; the gradient of out as `sum` expands it."""
    packed = torch.randn(2, 3, 4, 11, 8, dtype=torch.float64)  # batch, (q, k, v), heads, tokens, head_dim

    def gradients(contiguous):
        leaf = packed.clone().requires_grad_()
        q, k, v = leaf.transpose(2, 3).unbind(1)
        q, k, v = (t.contiguous() if contiguous else t for t in (q, k, v))
        assert q.is_contiguous() == contiguous
        out = df.attention(q, k, v, mask=df.Causal())
        out.sum().backward(torch.tensor(2.0, dtype=torch.float64))
        return out, leaf.grad

    for strided, plain in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


def ring_of_8(mask, seq_len=128):
    """Plans and the traffic of forward and of backward, of a contiguous float32 problem on 8 ranks."""
    simulator = df.transport.Simulator(8)
    p = Problem(mask, seq_len=seq_len, dtype=torch.float32)
    x = make_inputs(p)

    def work(transport):
        cp = df.ContextParallel(transport, df.Contiguous(), kernel=df.kernels.Reference())
        q, k, v = (cp.shard(t).requires_grad_() for t in (x.q, x.k, x.v))
        out = df.attention(q, k, v, mask=mask, cp=cp)
        transport.gather_ints([])  # every rank has sent what it sends in forward
        forward = simulator.traffic.messages, simulator.traffic.bytes
        transport.gather_ints([])
        out.backward(cp.shard(x.dout))
        return cp.plan(mask, seq_len), forward

    plans, forwards = zip(*simulator.run(work), strict=True)
    (forward,) = set(forwards)
    total = simulator.traffic
    kv_bytes = seq_len // 8 * p.kv_heads * (p.d_qk + p.d_v) * 4
    return plans, forward, (total.messages - forward[0], total.bytes - forward[1]), kv_bytes, total.pairs


def test_a_window_of_a_sixteenth_makes_one_hop():
    plans, forward, backward, kv_bytes, pairs = ring_of_8(df.Window(128 // 16 - 1, 0))
    assert [plan.exchanges for plan in plans] == [1] * 8
    # k and v of the last 7 of 16 keys from each rank to the next, but none from the last to the first.
    assert forward == (7 * 2, 7 * kv_bytes * 7 // 16)
    # The same again, and float32 gradients back.
    assert backward == (2 * 7 * 2, 2 * 7 * kv_bytes * 7 // 16)
    assert set(pairs) == {(r, r + 1) for r in range(7)} | {(r + 1, r) for r in range(7)}


def test_documents_within_shards_make_no_hop():
    plans, forward, backward, _, _ = ring_of_8(df.Documents(range(0, 129, 8)))
    assert [plan.exchanges for plan in plans] == [0] * 8
    assert forward == backward == (0, 0)


def test_a_full_mask_makes_all_hops():
    plans, forward, backward, kv_bytes, pairs = ring_of_8(df.Full())
    assert [plan.exchanges for plan in plans] == [7] * 8
    assert forward == (8 * 7 * 2, 8 * 7 * kv_bytes)
    assert backward == (2 * 8 * 7 * 2, 2 * 8 * 7 * kv_bytes)
    assert pairs.count((0, 1)) == 2 * (2 * 7) + 2  # keys twice round, and the gradients of one step


@given(problems(), layouts, st.integers(1, 8))
def test_a_plan_knows_all_beforehand(p, layout, world_size):
    simulator = df.transport.Simulator(world_size)
    plans = simulator.run(lambda t: df.ContextParallel(t, layout).plan(p.mask, p.seq_len))
    for rank, plan in enumerate(plans):
        assert torch.equal(plan.pairs, plans[0].pairs)
        assert plan.exchanges == plans[0].exchanges
        assert set(plan.sources) == {source for source in range(world_size) if plan.pairs[rank, source]}
        for source in plan.sources:
            assert sum(p.pairs for p in plan.passes if p.sources == (source,)) == plan.pairs[rank, source]
        assert list(plan.lengths) == [layout.length(p.seq_len, world_size, r) for r in range(world_size)]
    positions = torch.arange(p.seq_len)
    visible = p.mask.materialize(positions, positions, p.seq_len)
    assert plans[0].pairs.sum() == visible.sum()
    assert simulator.traffic.messages == 0
