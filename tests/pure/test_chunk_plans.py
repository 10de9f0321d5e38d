"""Plans of chunks: transfers, errors, and keys that may be dropped."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.chunks import Chunk, length_for, seen_later
from distflash.exact import ByValue
from distflash.kernels import Problem, Reference
from distflash.ledger import Ledger
from distflash.schedules.travel import KeysTravel
from distflash.transport import Simulator
from tests.strategies import examples, masks, patterns

ZIGZAG = df.Zigzag()


def chunk(mask, tokens, before=0, world_size=4, heads=(4, 2), dims=(64, 64)):
    ledger = Ledger.empty(world_size).with_chunk(ZIGZAG, before)
    problem = Problem(torch.device("cpu"), torch.bfloat16, *heads, *dims, 0.0, False, False, 0.0)
    return Chunk(ByValue(mask), ledger, ledger.with_chunk(ZIGZAG, tokens), ZIGZAG, problem)


def prefilled(schedule, tokens=4096, size=256):
    """Bytes that travel where 4K tokens on 4 ranks come in chunks: 2 query heads, a key head of 16, float32."""
    simulator = Simulator(4)

    def work(transport):
        cp = df.ContextParallel(transport, schedule=schedule)
        cache = df.Cache(cp, batch=1, kv_heads=1, d_qk=16, capacity=tokens, dtype=torch.float32)
        q, k = (cp.shard(torch.zeros(1, size, heads, 16)) for heads in (2, 1))
        for _ in range(tokens // size):
            df.attention(q, k, k, mask=df.Causal(), cp=cp, cache=cache)

    simulator.run(work)
    return simulator.traffic.bytes


def test_small_chunks_over_many_keys_pass_queries():
    """The ring would carry the whole cache once a chunk."""
    query, key, chunks = 2 * (16 + 16 + 2) * 4, (16 + 16) * 4, 4096 // 256
    whole_cache = sum(3 * 256 * n * key for n in range(1, chunks + 1))
    assert whole_cache == 12.75 * 2**20
    for schedule in (df.Ring(), df.PassQuery()):
        moved = prefilled(schedule)
        # Each query goes to three ranks; in the first chunks some see nothing there, or fewer keys move.
        assert 0.9 * 3 * 4096 * query <= moved <= 3 * 4096 * query < 3.2 * 2**20


@pytest.mark.parametrize(
    ("tokens", "before", "passes_queries"), [(16, 4096, True), (4096, 0, False), (1024, 512, False)]
)
def test_whichever_sends_fewer_bytes(tokens, before, passes_queries):
    each = chunk(df.Causal(), tokens, before)
    assert isinstance(each.lighter(df.Ring()), df.PassQuery) is passes_queries
    for schedule in (df.AllGather(2), df.DoubleRing(), df.Ulysses(df.Ring())):
        lighter = each.lighter(schedule)
        assert isinstance(lighter, df.PassQuery if passes_queries else KeysTravel)
        assert passes_queries or not isinstance(schedule, KeysTravel) or lighter is schedule
    assert isinstance(each.lighter(df.PassQuery()), df.PassQuery)


def test_a_window_asks_for_what_it_sees_alone():
    """Not for the whole cache: 4 tokens, 3 keys before them, of 4,096."""
    plan = chunk(df.Window(3), 4, 4096).plan(df.Ring(), Reference(), 0, True)
    rows = chunk(df.Window(3), 4, 4096).geometry.needs.rows
    assert sum(len(run) for of_rank in rows for runs in of_rank for run in runs) <= 4 * 7
    assert not plan.backward


def test_plans_of_chunks_do_not_push_out_those_of_training():
    def work(transport):
        cp = df.ContextParallel(transport)
        plan = cp.plan(df.Causal(), 64)
        cache = df.Cache(cp, batch=1, kv_heads=1, d_qk=8, capacity=64, dtype=torch.float32)
        x = torch.zeros(1, 1, 1, 8)
        for _ in range(30):
            df.attention(cp.shard(x), cp.shard(x), cp.shard(x), mask=df.Causal(), cp=cp, cache=cache, seq_len=1)
            df.decode(x, x, x, cache=cache)
        assert cp.plan(df.Causal(), 64) is plan
        return cp.calls.chunk_plan.cache_info().currsize

    assert max(Simulator(2).run(work)) <= 8


def test_layers_of_a_model_share_a_plan():
    def work(transport):
        cp = df.ContextParallel(transport)
        layers = [df.Cache(cp, batch=3, kv_heads=1, d_qk=8, capacity=64, dtype=torch.float32) for _ in range(5)]
        x, mask = torch.zeros(3, 4, 1, 8), df.Causal()
        for _ in range(2):
            for cache in layers:
                df.attention(x, x, x, mask=mask, cp=cp, cache=cache)
        return cp.calls.chunk_plan.cache_info().misses

    assert Simulator(2).run(work) == [2, 2]


@pytest.mark.parametrize(
    "mask", [df.Full(), df.PrefixLM(9), df.BlockCausal(6), df.Window(2, 1), df.ImageBlocks([6], [3])]
)
def test_keys_to_come_are_refused(mask):
    assert "keys that come after this chunk" in chunk(mask, 5, 3).refusal()
    assert chunk(mask & df.Causal(), 5, 3).refusal() is None


@pytest.mark.parametrize("mask", [df.PrefixLM(8), df.BlockCausal(4), df.ImageBlocks([6], [2]), df.Chunked(8)])
def test_what_is_seen_both_ways_within_a_chunk_is_not(mask):
    assert chunk(mask, 8).refusal() is None


@examples(60)
@given(st.data(), st.integers(0, 24))
def test_what_any_later_query_sees_is_kept(data, total):
    mask = data.draw(masks(24) | patterns(24)) & df.Causal()
    last = 96 if mask.seq_len is None else length_for(mask)
    queries, keys = torch.arange(total, max(total, last)), torch.arange(total)
    seen = mask.materialize(queries, keys, length_for(mask)).any(0)
    kept = torch.zeros(total, dtype=torch.bool)
    for run in seen_later(mask, total):
        kept[run.start : run.stop] = True
    assert not (seen & ~kept).any()


def test_what_only_queries_far_ahead_see_is_kept():
    """The third segment continues the first one; the queries next to come and the last ones do not see it."""
    tree = df.Tree([-1, -1, 0, -1], [10] * 4)
    assert seen_later(tree & df.Causal(), 12) == (range(12),)
    assert seen_later(tree & df.Causal(), 35) != () and seen_later(tree, 40) == ()


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (df.Window(4), (range(16, 20),)),
        (df.Window(4) & df.Documents([0, 18, 99]), (range(18, 20),)),
        (df.Chunked(8) & df.Causal(), (range(16, 20),)),
        (df.Chunked(4), ()),
        (df.Causal() & (df.FirstTokens(3) | df.Window(4)), (range(3), range(16, 20))),
        (df.Causal(), (range(20),)),
    ],
)
def test_no_more_than_later_queries_see_is_kept(mask, kept):
    """A query at 20 with four keys before its own: off by one, and it lacks a key or memory grows."""
    assert seen_later(mask, 20) == kept
