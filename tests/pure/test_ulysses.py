"""Ulysses: all-to-all over heads, on one- and two-dimensional meshes."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.schedules.heads import HeadShare
from tests.dense import Problem, assert_exact, assert_no_less_exact, in_dtype, join, make_inputs, on_rank, on_ranks
from tests.strategies import examples, layouts, masks, problems

SMALL_TILES = df.kernels.Reference(block_q=5, block_k=7)
SHAPES = [(1,), (2,), (3,), (4,), (1, 3), (2, 1), (2, 2), (2, 3), (3, 2), (4, 2)]


def on_mesh(p, x, shape, layout, schedule):
    """The problem over simulated ranks of a mesh, put together, and what moved."""
    simulator = df.transport.Simulator(prod(shape), shape=shape)
    parts = simulator.run(lambda t: on_rank(p, x, df.ContextParallel(t, layout, schedule, SMALL_TILES)))
    return join(parts, layout, p.seq_len), simulator.traffic


@st.composite
def cases(draw):
    """A problem with heads that the ranks can share, a mesh, and the schedule between groups."""
    shape, dim = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([-1, 0]))
    schedule = df.Ulysses(draw(st.sampled_from([df.Ring(), df.AllGather(2)])), dim).on(shape)
    p = draw(problems(max_seq_len=24))
    kv_heads = draw(st.integers(1, 4))
    groups = [n for n in range(1, 9) if kv_heads * n % schedule.degree == 0]
    p = replace(p, kv_heads=kv_heads, heads=kv_heads * draw(st.sampled_from(groups or [schedule.degree])))
    return p, shape, schedule


@examples(60)
@given(cases(), layouts)
def test_exact_in_float64(case, layout):
    p, shape, schedule = case
    x = make_inputs(p)
    got, _ = on_mesh(p, x, shape, layout, schedule)
    assert_exact(p, x, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (12, 6)])
def test_no_less_exact_than_one_rank(heads, kv_heads, dtype):
    """Gradients of key heads that several ranks read are added in float32."""
    p = in_dtype(Problem(df.Causal(), 61, batch=2, heads=heads, kv_heads=kv_heads, sinks=True), dtype)
    x = make_inputs(p)
    got, _ = on_mesh(p, x, (4,), df.Zigzag(), df.Ulysses())
    assert_no_less_exact(p, x, got, on_ranks(p, x, 1, df.Zigzag()))


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12))
def test_key_heads_are_repeated_no_more_than_they_must(kv_heads, group, ranks):
    heads = kv_heads * group
    if heads % ranks:
        return
    share = HeadShare(heads, kv_heads, ranks)
    for member in range(ranks):
        some, keys = range(heads)[share.queries(member)], share.keys(member)
        each = len(some) // len(keys)
        assert [keys[n // each] for n in range(len(some))] == [head // group for head in some]
        # Larger groups of neighbours would not read one key head.
        if each < len(some):
            wider = [b for b in range(each + 1, len(some) + 1) if len(some) % b == 0]
            reads = [head // group for head in some]
            assert all(any(len({*reads[n : n + b]}) > 1 for n in range(0, len(some), b)) for b in wider)
    sent = [range(kv_heads)[share.distinct(member)] for member in range(ranks)]
    assert {head for some in sent for head in some} == set(range(kv_heads))
    if kv_heads % ranks == 0:
        assert sum(map(len, sent)) == kv_heads and not share.replicates


def test_heads_that_do_not_divide_are_refused_on_every_rank():
    def call(transport):
        q, k = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 2, 8)
        with pytest.raises(ValueError) as caught:
            df.attention(q, k, k, cp=df.ContextParallel(transport, schedule=df.Ulysses()))
        return str(caught.value)

    simulator = df.transport.Simulator(4)
    for text in simulator.run(call):
        assert "6 query heads cannot be divided among the 4 ranks" in text and "[1, 2, 3, 6]" in text
    assert simulator.traffic.messages == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_heads_for_tokens(ranks):
    """Of each tensor a rank sends all but its own share of heads; gradients go the other way."""
    T, H, G, D, V = 8, 8, 4, 16, 8
    p = Problem(df.Causal(), T * ranks, heads=H, kv_heads=G, d_qk=D, d_v=V, dtype=torch.float32)
    _, traffic = on_mesh(p, make_inputs(p), (ranks,), df.Contiguous(), df.Ulysses())
    # Forward q, k, v in, out and lse out; backward q, out, dout, k, v, lse, dlse in, dq, dk, dv out.
    forward = H * D + G * (D + V) + H * V + H
    backward = H * D + 2 * H * V + G * (D + V) + 2 * H + H * D + G * (D + V)
    assert traffic.bytes == (ranks - 1) * T * (forward + backward) * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(inner="ring"), r"Ulysses\(inner\): expected another schedule"),
        (dict(inner=df.Ulysses()), r"Ulysses\(inner\): expected another schedule"),
        (dict(dim=2), r"Ulysses\(dim\): expected 0 or 1"),
        (dict(dim=1.0), r"Ulysses\(dim\): expected 0 or 1.* got 1.0"),
        (dict(dim=torch.tensor(1)), r"Ulysses\(dim\): expected 0 or 1"),
        (dict(dim=True), r"Ulysses\(dim\): expected 0 or 1.* got True"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        df.Ulysses(**options)


@given(masks(24), layouts)
@examples(20)
def test_a_plan_is_that_of_the_groups(mask, layout):
    cp = df.ContextParallel(
        df.transport.SimulatedTransport(df.transport.Simulator(6, shape=(2, 3)), 4), layout, df.Ulysses()
    )
    if mask.seq_len in (None, 24):
        plan = cp.plan(mask, 24)
        assert plan.world_size == 2 and plan.rank == 1
