"""Queries that are other tokens than the keys: chunks, cross-attention, and keys in another layout."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.transport import Simulator
from tests.dense import Problem, assert_exact, assert_no_less_exact, in_dtype, make_inputs, on_rank, on_ranks
from tests.strategies import chunks, examples, layouts, rows, schedules

SMALL_TILES = df.kernels.Reference(block_q=5, block_k=7)
LAYOUTS = [df.Contiguous(), df.Zigzag(), df.Striped()]
MASKS = [
    df.Full(),
    df.Causal(),
    df.Window(5, 2),
    df.Causal() & df.Documents([0, 7, 8, 21, 29]),
    df.Causal() & (df.Window(4) | df.FirstTokens(3)),
    df.Rows([df.Causal(), df.Documents([0, 11, 29]) | df.FirstTokens(2)]),
]


@examples(60)
@given(chunks(), layouts, st.integers(1, 8), schedules)
def test_exact_in_float64(p, layout, world_size, schedule):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, SMALL_TILES, schedule))


@examples(40)
@given(st.data(), chunks(), layouts, st.integers(1, 4))
def test_exact_in_float64_with_a_mask_for_each_sequence(data, p, layout, world_size):
    """Of chunks that lie among the keys; under `Rows` there are no others."""
    start = data.draw(st.integers(0, p.seq_len))
    p = replace(p, q_start=start, q_len=data.draw(st.integers(0, p.seq_len - start)))
    p = replace(p, mask=data.draw(rows(p.seq_len, p.batch)))
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, SMALL_TILES))


@given(chunks())
def test_exact_on_one_device(p):
    x = make_inputs(p)
    assert_exact(p, x, on_rank(p, x, None))


@pytest.mark.covering(2, layout=LAYOUTS, kv_layout=LAYOUTS, mask=MASKS)
def test_every_layout_of_queries_and_keys(layout, kv_layout, mask):
    for world_size, (start, count) in {1: (8, 13), 2: (0, 29), 3: (28, 1), 4: (5, 20), 8: (11, 7)}.items():
        p = Problem(
            mask, 29, batch=2, heads=4, kv_heads=2, alibi=True, sinks=True, q_start=start, q_len=count,
            kv_layout=kv_layout,
        )  # fmt: skip
        x = make_inputs(p)
        assert_exact(p, x, on_ranks(p, x, world_size, layout))


@pytest.mark.parametrize(("q_start", "q_len"), [(0, 0), (0, 5), (0, 60), (7, 60), (100, 3)])
@pytest.mark.parametrize("seq_len", [0, 1, 29])
@pytest.mark.parametrize("world_size", [1, 3])
def test_cross_attention(world_size, seq_len, q_start, q_len):
    p = Problem(df.Full(), seq_len, alibi=True, sinks=True, q_start=q_start, q_len=q_len, kv_layout=df.Contiguous())
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, df.Striped()))


@examples(20)
@given(chunks(), layouts, st.integers(2, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_less_exact_than_one_rank(p, layout, world_size, dtype):
    p = in_dtype(p, dtype)
    x = make_inputs(p)
    assert_no_less_exact(p, x, on_ranks(p, x, world_size, layout), on_ranks(p, x, 1, layout))


@pytest.mark.covering(1, layout=LAYOUTS, mask=MASKS[1:-1])
def test_chunks_one_after_the_other_are_the_whole(layout, mask):
    """Chunked prefill: outputs are those of one call, and the keys' gradients add up to its."""
    p = Problem(mask, 29, heads=4, kv_heads=2, alibi=True)
    x = make_inputs(p)
    whole = on_ranks(p, x, 3, layout)
    sums = {"dk": 0, "dv": 0}
    for start, stop in ((0, 11), (11, 12), (12, 29)):
        chunk = replace(p, q_start=start, q_len=stop - start)
        own = slice(start, stop)
        part = replace(x, q=x.q[:, own], dout=x.dout[:, own], dlse=x.dlse[:, :, own])
        got = on_ranks(chunk, part, 3, layout)
        for name in ("out", "dq"):
            torch.testing.assert_close(got[name], whole[name][:, own], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got["lse"], whole["lse"][:, :, own], rtol=1e-12, atol=1e-12)
        sums = {name: sums[name] + got[name] for name in sums}
    for name, total in sums.items():
        torch.testing.assert_close(total, whole[name], rtol=1e-12, atol=1e-12)


def attended(**arguments):
    """Out of 8 keys and so many queries over two ranks."""
    tokens = arguments.pop("tokens")

    def work(transport):
        cp = df.ContextParallel(transport, df.Contiguous())
        torch.manual_seed(0)
        q, k = torch.randn(1, tokens, 2, 4), torch.randn(1, 8, 2, 4)
        return df.attention(cp.shard(q), cp.shard(k), cp.shard(k), cp=cp, **arguments)

    return torch.cat(Simulator(2).run(work), 1)


def test_what_may_be_left_out():
    """q_len where ranks hold equally many queries; seq_len where they hold equally many keys; both in other types."""
    causal = dict(mask=df.Causal(), tokens=4)
    said = attended(q_start=3, q_len=4, seq_len=8, **causal)
    for left_out in (
        dict(q_start=3),
        dict(q_start=3, q_len=4),
        dict(q_start=3, seq_len=8),
        dict(q_start=torch.tensor(3), q_len=torch.tensor([4])),
    ):
        assert attended(**left_out, **causal).equal(said)
    own = attended(mask=df.Causal(), tokens=8)
    for explicit in (dict(q_start=0), dict(q_len=8), dict(kv_layout=df.Contiguous()), dict(q_start=0, q_len=8)):
        assert attended(mask=df.Causal(), tokens=8, **explicit).equal(own)


def test_plans():
    def work(transport):
        cp = df.ContextParallel(transport, df.Zigzag())
        plans = [
            cp.plan(df.Causal(), 8, q_start=5, q_len=2, kv_layout=df.Striped()),
            cp.plan(df.Causal(), 8, q_start=5),
            cp.plan(df.Causal(), 8),
            cp.plan(df.Full(), 8, q_len=20),
        ]
        assert cp.plan(df.Causal(), 8, q_start=0, q_len=8) is plans[2]
        return [int(plan.pairs.sum()) for plan in plans], plans[0].lengths

    for pairs, lengths in Simulator(3).run(work):
        assert pairs == [6 + 7, 6 + 7 + 8, 36, 160] and lengths == (3, 3, 2)


def test_only_the_keys_that_a_chunk_sees_move():
    def work(transport):
        cp = df.ContextParallel(transport, df.Contiguous())
        plan = cp.plan(df.Window(3), 64, q_start=60, q_len=4)
        return plan.moved(df.plan.What.KEYS)

    # Position 57 to 63, all on the last rank, for the query of each other rank and 3 before it.
    assert Simulator(4).run(work) == [4, 4, 4, 0]
