"""Exactness: forward, lse and all gradients against dense float64, over masks, layouts, lengths, shapes and ranks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.engine import Call
from distflash.kernels.base import Scores
from tests.dense import (
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
from tests.pairing import Pairing
from tests.strategies import examples, layouts, problems

# Tiles so small that short sequences have empty, full and cut ones.
SMALL_TILES = df.kernels.Reference(block_q=5, block_k=7)


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()


@examples(120)
@given(problems(), layouts, st.integers(1, 8))
def test_exact_in_float64(p, layout, world_size):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, SMALL_TILES))


@examples(60)
@given(problems(), layouts, st.integers(2, 8))
def test_exact_where_two_owners_are_taken_at_once(p, layout, world_size):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, Pairing(block_q=5, block_k=7)))


@pytest.mark.parametrize(("kv_heads", "expected"), [(1, []), (2, ["both", "some"]), (8, ["both", "some"])])
def test_some_heads_do_not_wait_for_the_first_keys(kv_heads, expected):
    kernel = Pairing()
    p = Problem(seq_len=40, heads=8, kv_heads=kv_heads)
    on_ranks(p, make_inputs(p), 3, df.Zigzag(), kernel)
    assert sorted(kernel.taken) == sorted(3 * expected)


def test_some_heads_go_back_to_own_keys_while_gradients_travel_home():
    kernel = Pairing()
    p = Problem(seq_len=40, heads=8, kv_heads=8)
    on_ranks(p, make_inputs(p), 2, df.Zigzag(), kernel)
    assert sorted(kernel.taken) == sorted(2 * ["some", "both", "backward 0 to 2", "backward 2 to 8"])


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
    assert_exact(p, x, on_ranks(p, x, world_size, layout, Pairing()))


@examples(200)
@given(problems(), layouts, st.integers(2, 8))
def test_nothing_is_overwritten_after_something_was_added_to_it(p, layout, world_size):
    """The order in which a rank's own dK and dV are written and added to, by its plan, for any number of key heads."""

    def events(transport):
        cp = df.ContextParallel(transport, layout)
        plan = cp.plan(p.mask, p.seq_len)
        call = Call(plan, cp.schedule, transport, Pairing(), Scores(1.0))
        held_back = call.heads_apart(torch.empty(1, cp.seq_local(p.seq_len), p.kv_heads, 1), enough=0)
        order = []
        for step, following in zip(plan.steps, (*plan.steps[1:], None), strict=True):
            if step.works and step.owner == transport.rank:
                order.append("overwrite")
            if step.home_from is not None and following is not None:
                order.append("add")  # when the exchange of the following step begins
        return [*order, "overwrite"] if held_back else order

    for order in df.transport.Simulator(world_size).run(events):
        assert "add" not in order or "overwrite" not in order[order.index("add") :]


def test_no_head_is_held_back_where_there_is_little_work():
    kernel = Pairing(enough=41)  # of a rank's 20 keys, each counted for two heads
    p = Problem(seq_len=40, heads=8, kv_heads=8)
    on_ranks(p, make_inputs(p), 2, df.Zigzag(), kernel)
    assert sorted(kernel.taken) == sorted(2 * ["some", "both"])


def test_no_head_waits_for_keys_from_afar():
    kernel = Pairing()
    p = Problem(seq_len=40, heads=8, kv_heads=8)
    x = make_inputs(p)
    df.transport.Simulator(2).run(
        lambda near: on_rank(p, x, df.ContextParallel(replace(near, near=False), df.Zigzag(), kernel=kernel))
    )
    assert not kernel.taken


@examples(40)
@given(problems(), layouts, st.integers(2, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_less_exact_than_one_rank(p, layout, world_size, dtype):
    p = in_dtype(p, dtype)
    x = make_inputs(p)
    one_rank = on_ranks(p, x, 1, layout)
    assert_no_less_exact(p, x, on_ranks(p, x, world_size, layout), one_rank)


@pytest.fixture(scope="module")
def long_problem():
    """Long enough for 64 ranks, and the whole of it on one of them; by dtype."""

    def solve(dtype):
        p = Problem(seq_len=512, d_qk=32, d_v=32, sinks=True, dtype=dtype)
        x = make_inputs(p)
        return p, x, on_ranks(p, x, 1, df.Contiguous())

    return {dtype: solve(dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, 4, 8, 16, 32, 64])
def test_error_stays_flat_however_many_ranks(world_size, dtype, long_problem):
    p, x, one_rank = long_problem[dtype]
    got = on_ranks(p, x, world_size, df.Zigzag())
    assert_no_less_exact(p, x, got, one_rank)
    # So many tokens need no floor.
    errors, bar = relative_errors(p, x, got), relative_errors(p, x, one_rank)
    assert all(errors[name] <= 1.1 * bar[name] for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_queries_that_see_nothing(dtype, layout, world_size):
    """Exact zeros, lse -inf, no gradient to anything and no NaN, though lse is given a gradient too."""
    mask = Blind(5, 17) & df.Window(6, 2)
    p = Problem(mask, seq_len=29, batch=2, dtype=dtype)
    got = on_ranks(p, make_inputs(p), world_size, layout, SMALL_TILES)
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
def test_sinks_where_nothing_is_seen(world_size, sink):
    """All of the softmax is the sink's; one of -inf is no sink at all."""
    p = Problem(Blind(0, 8), seq_len=8, sinks=True)
    x = make_inputs(p)
    x.sinks.fill_(sink)
    got = on_ranks(p, x, world_size, df.Contiguous())
    assert (got["out"] == 0).all() and (got["lse"] == sink).all()
    # lse is the sink itself, so its gradient is the sink's.
    expected = x.dlse.sum((0, 2)) if sink > -torch.inf else torch.zeros(p.heads)
    torch.testing.assert_close(got["dsinks"], expected.to(got["dsinks"].dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seq_len", [0, 1, 3, 5])
@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
def test_more_ranks_than_tokens(layout, seq_len):
    p = Problem(seq_len=seq_len, sinks=True)
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, 6, layout))


def test_a_batch_of_none_sends_nothing():
    p = Problem(seq_len=6, batch=0, heads=4, kv_heads=2, d_v=5, sinks=True)
    x = make_inputs(p)
    simulator = df.transport.Simulator(2)
    parts = simulator.run(lambda t: on_rank(p, x, df.ContextParallel(t, kernel=df.kernels.Reference())))
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
    assert [plan.hops for plan in plans] == [1] * 8
    # k and v from each rank to the next, but none from the last to the first.
    assert forward == (7 * 2, 7 * kv_bytes)
    # The same again, and float32 gradients back.
    assert backward == (2 * 7 * 2, 2 * 7 * kv_bytes)
    assert set(pairs) == {(r, r + 1) for r in range(7)} | {(r + 1, r) for r in range(7)}


def test_documents_within_shards_make_no_hop():
    plans, forward, backward, _, _ = ring_of_8(df.Documents(range(0, 129, 8)))
    assert [plan.hops for plan in plans] == [0] * 8
    assert forward == backward == (0, 0)


def test_a_full_mask_makes_all_hops():
    plans, forward, backward, kv_bytes, pairs = ring_of_8(df.Full())
    assert [plan.hops for plan in plans] == [7] * 8
    assert forward == (8 * 7 * 2, 8 * 7 * kv_bytes)
    assert backward == (2 * 8 * 7 * 2, 2 * 8 * 7 * kv_bytes)
    assert pairs.count((0, 1)) == 2 * (2 * 7) + 2  # keys twice round, and the gradients of one step


@given(problems(), layouts, st.integers(1, 8))
def test_a_plan_knows_all_beforehand(p, layout, world_size):
    simulator = df.transport.Simulator(world_size)
    plans = simulator.run(lambda t: df.ContextParallel(t, layout).plan(p.mask, p.seq_len))
    for rank, plan in enumerate(plans):
        assert torch.equal(plan.pairs, plans[0].pairs)
        assert plan.hops == plans[0].hops
        assert set(plan.intervals) == {owner for owner in range(world_size) if plan.pairs[rank, owner]}
        assert all(sum(x.pairs for x in plan.intervals[o]) == plan.pairs[rank, o] for o in plan.intervals)
        assert list(plan.lengths) == [layout.length(p.seq_len, world_size, r) for r in range(world_size)]
    positions = torch.arange(p.seq_len)
    visible = p.mask.materialize(positions, positions, p.seq_len)
    assert plans[0].pairs.sum() == visible.sum()
    assert simulator.traffic.messages == 0
