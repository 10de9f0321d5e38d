"""A mask per sequence of a batch: exact, and an error if masks and batch do not match."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.folding import Folding
from distflash.geometry import Folded, Sharded
from distflash.placement import Held
from distflash.rows import geometry_of
from distflash.transport import Simulator
from tests.dense import Problem, assert_exact, make_inputs, on_rank, on_ranks
from tests.plans import check
from tests.strategies import examples, layouts, problems_of_rows, rows, schedules

SMALL_TILES = df.kernels.Reference(block_q=5, block_k=7)
DOCUMENTS = df.Documents([0, 3, 8])


@examples(30)
@given(problems_of_rows(), layouts, st.integers(1, 8), schedules)
def test_exact_in_float64(p, layout, world_size, schedule):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, SMALL_TILES, schedule))


@given(problems_of_rows())
def test_exact_on_one_device(p):
    x = make_inputs(p)
    assert_exact(p, x, on_rank(p, x, None))


@examples(20)
@given(st.data(), st.integers(0, 20), st.integers(1, 6), layouts, layouts, schedules)
def test_plans(data, seq_len, world_size, of_queries, of_keys, schedule):
    start = data.draw(st.integers(0, seq_len))
    queries = Sharded(of_queries, data.draw(st.integers(0, seq_len - start)), world_size, start)
    keys = Sharded(of_keys, seq_len, world_size)
    geometry = geometry_of(data.draw(rows(seq_len, data.draw(st.integers(0, 4)))), queries, keys, seq_len)
    check([schedule.plan(geometry, rank) for rank in range(world_size)], geometry, kv_heads=2)


@given(st.data(), st.integers(0, 20), st.integers(0, 4), st.integers(1, 4))
def test_folded_tokens_are_those_of_all_rows(data, seq_len, count, world_size):
    tokens = Sharded(data.draw(layouts), seq_len, world_size)
    folded = Folded(tokens, seq_len, count)
    ends = torch.arange(count * seq_len + 1)
    for rank in range(world_size):
        own = tokens.positions(rank)
        positions = torch.cat([own[:0], *(own + row * seq_len for row in range(count))])
        assert folded.positions(rank).equal(positions) and folded.length(rank) == len(positions)
        assert folded.count_below(ends, rank).equal(torch.searchsorted(positions, ends))


@given(st.data(), st.integers(0, 20))
def test_what_a_row_sees_is_what_its_mask_shows(data, seq_len):
    mask = data.draw(rows(seq_len, 3))
    tokens = Sharded(df.Contiguous(), seq_len, 1)
    geometry = geometry_of(mask, tokens, tokens, seq_len)
    positions, own = geometry.queries.positions(0), torch.arange(seq_len)
    expected = torch.block_diag(*[m.materialize(own, own, seq_len).int() for m in mask.masks]).bool()
    if seq_len:
        assert geometry.mask.materialize(positions, positions).equal(expected)


@pytest.mark.parametrize(("B", "T", "H", "D"), [(3, 4, 2, 5), (1, 4, 2, 5), (3, 0, 2, 5), (2, 1, 1, 1)])
def test_folding_and_back(B, T, H, D):
    x, lse, fold = torch.randn(B, T, H, D), torch.randn(B, H, T), Folding(B)
    seen = fold.inward(Held((x,), (x,), (lse,)))
    one, numbers = seen.queries[0], seen.numbers[0]
    assert one.shape == (1, B * T, H, D) and numbers.shape == (1, H, B * T)
    assert all(torch.equal(one[0, b * T : (b + 1) * T], x[b]) for b in range(B))
    assert all(torch.equal(numbers[0, :, b * T : (b + 1) * T], lse[b]) for b in range(B))
    assert torch.equal(seen.keys[0], one) and one.data_ptr() == x.data_ptr()
    back = fold.outward(seen)
    assert torch.equal(back.queries[0], x) and torch.equal(back.keys[0], x) and torch.equal(back.numbers[0], lse)
    assert back.numbers[0].is_contiguous()


def test_each_row_as_if_it_were_alone():
    q, k, v = (torch.randn(3, 8, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = df.Rows([df.Causal(), DOCUMENTS, df.Full()])
    out, lse = df.attention(q, k, v, mask=mask, return_lse=True)
    gradients = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    for row in range(3):
        one = [x.detach()[row : row + 1].requires_grad_() for x in (q, k, v)]
        alone = df.attention(*one, mask=mask.masks[row], return_lse=True)
        of_one = torch.autograd.grad(alone[0].square().sum() + alone[1].sum(), one)
        for got, expected in zip((out, lse, *gradients), (*alone, *of_one), strict=True):
            torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-12, atol=1e-12)


def test_plans_count_the_pairs_of_all_rows():
    def work(transport):
        cp = df.ContextParallel(transport)
        together = cp.plan(df.Rows([df.Causal(), DOCUMENTS]), 8)
        return together.pairs, sum(cp.plan(mask, 8).pairs for mask in (df.Causal(), DOCUMENTS))

    for together, apart in Simulator(3).run(work):
        assert together.equal(apart)


def test_as_many_passes_as_the_row_that_takes_most():
    union = df.Window(1) | df.FirstTokens(1)
    cp = df.ContextParallel(df.transport.Alone())
    passes = [len(cp.plan(df.Rows(masks), 16).passes) for masks in ([union] * 3, [union, df.Full()], [df.Causal()] * 3)]
    assert passes == [2, 2, 1]


def test_combinations_are_row_by_row():
    a, b, c = df.Causal(), df.Window(3), df.PrefixLM(2)
    two = df.Rows([a, b])
    assert c & two == df.Rows([c & a, c & b]) and two & c == df.Rows([a & c, b & c])
    assert c | two == df.Rows([c | a, c | b]) and two | c == df.Rows([a | c, b | c])
    assert two & df.Rows([b, c]) == df.Rows([a & b, b & c]) and two | df.Rows([b, c]) == df.Rows([a | b, b | c])
    assert (a | b) & two == df.Rows([(a | b) & a, (a | b) & b])
    with pytest.raises(TypeError, match="unsupported operand"):
        two & 3


def test_the_length_is_that_of_every_row():
    assert df.Rows([df.Causal(), df.Causal()]).seq_len is None
    assert df.Rows([df.Causal(), DOCUMENTS]).seq_len == 8
    assert (df.Rows([df.Causal(), df.Full()]) & DOCUMENTS).seq_len == 8
    # So the call needs none, where ranks hold different numbers of tokens.
    q, mask = torch.randn(2, 7, 2, 4), df.Rows([df.Documents([0, 7]), df.Documents([0, 2, 7])])
    shards = Simulator(3).run(lambda t: df.attention(*[df.ContextParallel(t).shard(q)] * 3, mask=mask, cp=_cp(t)))
    assert sum(out.shape[1] for out in shards) == 7


def _cp(transport):
    return df.ContextParallel(transport)


def test_positions_are_alike_in_all_rows():
    def work(transport):
        cp = df.ContextParallel(transport)
        x, mask = torch.zeros(2, cp.seq_local(8), 3), df.Rows([DOCUMENTS, df.Causal()])
        return cp.positions_of(x, mask=mask).equal(cp.positions(8))

    assert all(Simulator(3).run(work))


def test_equal_masks_are_equal_objects():
    one, other = df.Rows([df.Causal(), df.Documents([0, 3, 8])]), df.Rows((df.Causal(), df.Documents([0, 3, 3, 8, 8])))
    assert one == other and hash(one) == hash(other) and one != df.Rows([df.Causal(), df.Causal()])
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one and eval(repr(one), vars(df)) == one


def test_materialize_is_one_for_each_row():
    positions = torch.arange(8)
    seen = df.Rows([df.Causal(), DOCUMENTS]).materialize(positions, positions)
    assert seen.shape == (2, 8, 8)
    assert seen[0].equal(df.Causal().materialize(positions, positions))
    assert seen[1].equal(DOCUMENTS.materialize(positions, positions))
    assert df.Rows([]).materialize(positions, positions).shape == (0, 8, 8)
    with pytest.raises(TypeError, match=r"use masks\[n\].parts"):
        df.Rows([df.Causal()]).parts(positions, 8)


@pytest.mark.parametrize(
    ("of_rank", "words"),
    [
        (
            lambda rank: df.Rows([DOCUMENTS, df.Causal() if rank else df.Full()]),
            "mask differs between rank 0 and rank 1",
        ),
        (lambda rank: df.Rows([DOCUMENTS] * (3 if rank else 2)), "rank 1 refused|Rows of 3 masks for a batch of 2"),
    ],
)
def test_ranks_that_disagree_are_told(of_rank, words):
    simulator = Simulator(2)

    def work(transport):
        q = torch.zeros(2, 4, 2, 4)
        with pytest.raises(ValueError, match=words):
            df.attention(q, q, q, mask=of_rank(transport.rank), cp=df.ContextParallel(transport))

    simulator.run(work)
    assert simulator.traffic.messages == 0


def test_rows_of_equal_masks_are_the_mask():
    """And move what it moves."""
    masks = df.Causal() & df.Window(5), df.Rows([df.Causal() & df.Window(5)] * 3)
    results, bytes_moved = [], []
    for mask in masks:
        p = Problem(mask, 29, batch=3, heads=4, kv_heads=2, alibi=True)
        x = make_inputs(p)
        simulator = Simulator(3)
        parts = simulator.run(lambda t, p=p, x=x: on_rank(p, x, df.ContextParallel(t, df.Contiguous())))
        results.append(parts)
        bytes_moved.append(simulator.traffic.bytes)
    assert bytes_moved[0] == bytes_moved[1] > 0
    for one, other in zip(*results, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [df.Ring(), df.Ulysses(), df.PassQuery()], ids=repr)
@pytest.mark.parametrize("mask", [df.Rows([]), df.Causal()], ids=repr)
def test_a_batch_of_none(mask, schedule):
    p = Problem(mask, seq_len=8, batch=0, sinks=True)
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, 2, df.Zigzag(), schedule=schedule))


def test_a_module_takes_them():
    torch.manual_seed(0)
    module, x = df.nn.SelfAttention(16, heads=4, kv_heads=2).double(), torch.randn(2, 8, 16, dtype=torch.float64)
    out = module(x, mask=df.Rows([df.Causal(), DOCUMENTS]))
    alone = [module(x[n : n + 1], mask=mask) for n, mask in enumerate((df.Causal(), DOCUMENTS))]
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-12, atol=1e-12)
