"""The largest score of each head, beside dense scores, over masks, layouts, schedules and ranks."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from tests.dense import (
    Problem,
    assert_exact,
    assert_largest,
    assert_no_less_exact,
    in_dtype,
    join,
    keys_of,
    make_inputs,
    options,
)
from tests.oracle import Blind
from tests.strategies import chunks, examples, layouts, problems, problems_of_rows, schedules

SMALL_TILES = df.kernels.Reference(block_q=5, block_k=7)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def call(p, x, cp, **more):
    """This rank's results, the largest scores last, and its gradients."""
    leaves = [t.requires_grad_() for t in (cp.shard(x.q), *(keys_of(p, t, cp) for t in (x.k, x.v)))]
    sinks = None if x.sinks is None else x.sinks.clone().requires_grad_()
    results = df.attention(*leaves, cp=cp, alibi_slopes=x.slopes, sinks=sinks, return_lse=True, **options(p), **more)
    torch.autograd.backward(results[:2], (cp.shard(x.dout), cp.shard(x.dlse, dim=2)))
    leaves += [] if sinks is None else [sinks]
    return [t.detach() for t in results], [t.grad for t in leaves], [t.requires_grad for t in results]


def check(p, ranks, layout, schedule, kernel=SMALL_TILES, shape=None):
    """All ranks of a simulated group: the largest scores are right and have the same bits, and change nothing else."""
    x = make_inputs(p)

    def work(transport):
        cp = df.ContextParallel(transport, layout, schedule, kernel)
        return call(p, x, cp), call(p, x, cp, return_max_logits=True)

    of_ranks = df.transport.Simulator(ranks, shape=shape).run(work)
    for (without, gradients, _), ((*results, found), others, differentiable) in of_ranks:
        assert differentiable == [True, True, False]
        assert torch.equal(found, of_ranks[0][1][0][2])
        assert_largest(p, x, found)
        if not p.sinks:  # these are added in the end instead of in the beginning
            assert all(map(torch.equal, (*without, *gradients), (*results, *others)))
    without, got = (join(parts, layout, p.queries, p.kv_layout, p.seq_len) for parts in named(of_ranks))
    if p.dtype == torch.float64:
        assert_exact(p, x, got)
    else:
        assert_no_less_exact(p, x, got, without)


def named(of_ranks):
    """The ranks' results and gradients by name, of the calls without and with the largest scores."""
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    return [
        [dict(zip(names, (*each[n][0][:2], *each[n][1]), strict=False)) for each in of_ranks]  # without sinks one less
        for n in (0, 1)
    ]


@examples(60)
@given(problems(), layouts, st.integers(1, 8), schedules, DTYPES)
def test_right_on_all_ranks(p, layout, world_size, schedule, dtype):
    check(in_dtype(p, dtype), world_size, layout, schedule)


@examples(16)
@given(problems_of_rows(), layouts, st.integers(1, 4), schedules)
def test_of_rows(p, layout, world_size, schedule):
    check(p, world_size, layout, schedule)


@examples(16)
@given(chunks(), layouts, st.integers(1, 4), schedules)
def test_of_queries_that_are_other_tokens(p, layout, world_size, schedule):
    check(p, world_size, layout, schedule)


@examples(16)
@given(problems(), st.sampled_from([(2,), (3,), (2, 2), (2, 3)]), layouts, st.sampled_from([-1, 0]), DTYPES)
def test_where_ranks_have_some_of_the_heads(p, shape, layout, dim, dtype):
    schedule = df.Ulysses(dim=dim)
    p = replace(in_dtype(p, dtype), heads=p.kv_heads * schedule.on(shape).degree)
    check(p, prod(shape), layout, schedule, shape=shape)


@examples(16)
@given(problems(), st.integers(1, 4), st.integers(1, 12), DTYPES)
def test_of_fixed_chunks(p, world_size, chunk, dtype):
    layout = df.WholeChunks(df.Zigzag(), chunk)
    check(in_dtype(p, dtype), world_size, layout, df.Reproducible(chunk))


@pytest.mark.parametrize("schedule", [df.Ring(), df.PassQuery(), df.Reproducible(4)], ids=repr)
def test_neither_sinks_nor_what_is_masked_count(schedule):
    """Sinks, and scores of keys that nobody sees, above all that are seen."""
    p = Problem(Blind(5, 20) & df.Window(6, 0), 24, heads=4, kv_heads=2, sinks=True)
    x = make_inputs(p)
    x.k[:, 5:20] *= 1e6
    x.sinks.fill_(1e3)

    def work(transport):
        cp = df.ContextParallel(transport, df.WholeChunks(df.Contiguous(), 4), schedule, SMALL_TILES)
        return df.attention(*map(cp.shard, (x.q, x.k, x.v)), cp=cp, sinks=x.sinks, return_max_logits=True, **options(p))

    for out, found in df.transport.Simulator(3).run(work):
        assert out.abs().max() < 1e-300  # the sinks have all of the probability
        assert_largest(p, replace(x, k=x.k.clone().index_fill_(1, torch.arange(5, 20), 0.0)), found)


def test_of_nothing():
    nothing = torch.zeros(0, 8, 4, 16)
    for cp in (None, df.ContextParallel(df.transport.Alone(), schedule=df.Reproducible(4))):
        out, found = df.attention(nothing, nothing, nothing, cp=cp, return_max_logits=True)
        assert out.shape == nothing.shape and torch.equal(found, torch.full((4,), -torch.inf))
    few = torch.zeros(1, 0, 4, 16)
    assert torch.equal(df.attention(few, few, few, return_max_logits=True)[1], torch.full((4,), -torch.inf))


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_compiled_as_eager(lse, trained):
    torch._dynamo.reset()
    x = make_inputs(Problem(seq_len=20, heads=4, kv_heads=2))

    def attend(q, k, v):
        return df.attention(q, k, v, mask=df.Causal(), return_lse=lse, return_max_logits=True)

    def run(function):
        leaves = [t.clone().requires_grad_(trained) for t in (x.q, x.k, x.v)]
        results = function(*leaves)
        assert len(results) == 2 + lse and not results[-1].requires_grad
        gradients = torch.autograd.grad(results[0].square().sum(), leaves) if trained else ()
        return *results, *gradients

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(attend), run(compiled), strict=True):
        assert torch.equal(one, other)


def test_ranks_that_disagree_are_told():
    def work(transport):
        cp = df.ContextParallel(transport)
        q = torch.zeros(1, 4, 2, 8)
        with pytest.raises(ValueError, match="return_max_logits differs between rank 0 and rank 1"):
            df.attention(q, q, q, cp=cp, return_max_logits=cp.rank == 1)

    df.transport.Simulator(2).run(work)


def test_qk_clip():
    """Weights scaled by the roots of ``tau / max_logits`` give scores of at most tau."""
    x, tau = make_inputs(Problem(seq_len=30, heads=4, kv_heads=4, scale=2.0)), 3.0
    _, before = df.attention(x.q, x.k, x.v, scale=2.0, return_max_logits=True)
    assert (before > tau).all()
    factor = (tau / before).clamp(max=1.0).sqrt()[:, None]
    _, after = df.attention(x.q * factor, x.k * factor, x.v, scale=2.0, return_max_logits=True)
    torch.testing.assert_close(after, torch.full_like(after, tau))


def test_not_with_a_cache():
    cp = df.ContextParallel(df.transport.Alone())
    q = torch.zeros(1, 4, 2, 8)
    cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=8, capacity=16, dtype=q.dtype)
    with pytest.raises(ValueError, match="return_max_logits: expected False with a cache"):
        df.attention(q, q, q, cp=cp, cache=cache, mask=df.Causal(), return_max_logits=True)
