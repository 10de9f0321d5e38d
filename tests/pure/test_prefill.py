"""Chunked prefill: known bugs of other implementations, each with a test named after it, and errors."""

import pytest
import torch

import distflash as df
from distflash.layouts import Layout
from distflash.transport import Simulator
from tests.dense import Problem
from tests.growing import (
    Chunk,
    Lopsided,
    MakeRoom,
    Reorder,
    Script,
    Step,
    Truncate,
    assert_exact,
    on_ranks,
    poison,
    told,
)
from tests.strategies import SCHEDULES

ZIGZAG = df.Zigzag()
LAYOUTS = [df.Contiguous(), df.Zigzag(), df.Striped(), Lopsided()]


def check(problem, *actions, world_size=3, layout=ZIGZAG, capacity=64, **arguments):
    script = Script(problem, actions, capacity)
    x = told(script)
    assert_exact(script, x, on_ranks(script, x, world_size, layout, **arguments))


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
def test_any_length_of_chunk(world_size, layout):
    """One token, fewer than ranks, odd lengths, none."""
    chunks = [Chunk(n) for n in (1, 1, 3, 0, 17, 2, 7, 1)]
    check(Problem(heads=2, batch=2), *chunks, world_size=world_size, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_a_chunk_longer_than_the_window(layout):
    """Its own first tokens are seen by none of its last, and keys of the chunk before by its first alone."""
    for mask in (df.Window(3), df.Causal() & (df.FirstTokens(2) | df.Window(3)), df.Chunked(4) & df.Causal()):
        check(Problem(mask=mask, heads=2), Chunk(11), Chunk(13), Step(1), Chunk(9), layout=layout, world_size=4)
        check(Problem(mask=mask), Chunk(11), Chunk(11), Chunk(11), capacity=16, layout=layout, world_size=4)


@pytest.mark.parametrize("size", range(1, 7))
def test_a_window_that_wraps(size):
    """Memory for what later tokens see and the chunk alone."""
    p = Problem(mask=df.Window(size - 1), heads=2)
    check(p, *[Chunk(3)] * 7, capacity=size + 2, world_size=3)
    check(p, *[Chunk(1)] * 9, capacity=size, world_size=2)


@pytest.mark.parametrize("schedule", [*SCHEDULES, df.Ulysses(df.Ring())], ids=repr)
def test_positions(schedule):
    """Distances count from the sequence's start, also of keys that were moved to other ranks or behind dropped ones."""
    p = Problem(mask=df.Window(8), alibi=True, heads=3, scale=0.5)
    check(
        p, Chunk(3), Chunk(10), MakeRoom(), Chunk(1), Chunk(12), Truncate(24), Chunk(5), world_size=4, schedule=schedule
    )


def test_chunks_of_one_token_are_spread():
    """Seven of one token, which a layout gives one rank."""

    def work(transport):
        cp = df.ContextParallel(transport)
        cache = df.Cache(cp, batch=1, kv_heads=1, d_qk=8, capacity=8, dtype=torch.float64)
        x = cp.shard(torch.ones(1, 1, 1, 8, dtype=torch.float64))
        for _ in range(7):
            df.attention(x, x, x, mask=df.Causal(), cp=cp, cache=cache, seq_len=1)
        return cache.kept()[0], cache.store.room

    kept = Simulator(4).run(work)
    assert sorted(kept) == [(1, 2), (2, 2), (2, 2), (2, 2)]


def test_no_more_memory_than_was_allocated():
    """A sequence fits wherever capacity tokens do, whatever the layout gives a rank."""
    check(
        Problem(),
        Chunk(1),
        Chunk(2),
        Chunk(5),
        Chunk(1),
        Step(1),
        Chunk(3),
        capacity=13,
        world_size=5,
        layout=Lopsided(),
    )
    check(Problem(), Chunk(13), capacity=13, world_size=4, layout=Lopsided())


def test_sequences_of_unequal_length_in_one_chunk():
    p = Problem(batch=3, alibi=True, mask=df.Rows([df.Causal(), df.Window(4), df.Chunked(5) & df.Causal()]))
    check(p, Chunk(9, 0), Chunk(2, 1), Chunk(6), Truncate((15, 3, 0)), Chunk(4), Reorder((0, 1, 2)), Step(2))


def test_several_turns():
    """A prompt, an answer, another prompt; then the second prompt again, after the first answer was cut short."""
    check(Problem(batch=2, heads=4), Chunk(13), *[Step(1)] * 4, Chunk(7), Step(1), Truncate(15), Chunk(9), Step(2))


# What is wrong in a call of four ranks, whose cache of 16 has 9 tokens: other arguments, and words.
WRONG = {
    "capacity exceeded": (dict(tokens=8), "cache: 8 more tokens do not fit beside the 9 that are kept"),
    "a length that ranks do not hold": (dict(seq_len=30), r"q: 1 local tokens, but Zigzag\(\) gives rank \d of 4"),
    "another dtype": (dict(change=torch.Tensor.float), "k: is torch.float32 on cpu, the cache torch.float64"),
    "another batch": (dict(batch=2), "k: is for 2 sequences with 1 heads of 8, the cache for 1"),
    "other heads": (dict(change=lambda x: x.repeat(1, 1, 2, 1)), "k: is for 1 sequences with 2 heads of 8"),
    "a gradient": (dict(change=lambda x: x.requires_grad_()), "q, k, v, sinks: require a gradient"),
    "a learned sink": (dict(sinks=torch.zeros(1, requires_grad=True)), "q, k, v, sinks: require a gradient"),
    "keys to come": (dict(mask=df.Window(1, 1)), "mask: Window.* see keys that come after this chunk"),
    "no mask": (dict(mask=df.Full()), "mask: Full.* see keys that come after this chunk"),
    "a mask that knows fewer tokens": (dict(mask=df.Causal() & df.Documents([0, 12])), "mask: .*of 12 tokens"),
    "masks for two sequences": (dict(mask=df.Rows([df.Causal()] * 2)), "mask: Rows of 2 masks for a batch of 1"),
    "q_start": (dict(q_start=9, q_len=4), "cache: with a cache queries are the tokens of the chunk"),
    "kv_layout": (dict(kv_layout=df.Striped()), "cache: with a cache queries are the tokens of the chunk"),
    "no cache": (dict(cache="dynamic"), "cache: expected a df.Cache, got 'dynamic'"),
    "dropout": (dict(dropout_p=0.1, dropout_seed=1), "dropout_p: expected 0 with a cache, .*got 0.1"),
}  # fmt: skip


def appended(own, tokens=4, batch=1, change=lambda x: x, **arguments):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, tokens, 1, 8, dtype=torch.float64, generator=generator)
    x = change(own.cp.shard(x))
    given = dict(mask=df.Causal(), seq_len=tokens, cache=own, cp=own.cp) | arguments
    return df.attention(x, x, x, **given)


@pytest.mark.parametrize("name", WRONG)
def test_refused_and_the_cache_as_it_was(name):
    change, words = WRONG[name]

    def work(transport, refused):
        cp = df.ContextParallel(transport)
        cache = df.Cache(cp, batch=1, kv_heads=1, d_qk=8, capacity=16, dtype=torch.float64)
        poison(cache)
        appended(cache, 9)
        if refused:
            with pytest.raises(ValueError, match=words):
                appended(cache, **change)
            assert cache.lengths == (9,) and cache.store.lengths.tolist() == [9]
        return appended(cache)

    got, expected = (Simulator(4).run(lambda t, refused=refused: work(t, refused)) for refused in (True, False))
    assert all(map(torch.equal, got, expected))


def test_a_cache_of_another_group():
    def work(transport):
        mine, other = (df.ContextParallel(transport) for _ in range(2))
        cache = df.Cache(mine, batch=1, kv_heads=1, d_qk=8, capacity=16, dtype=torch.float64)
        with pytest.raises(
            ValueError, match=r"cache: was made with .* has another one, .* pass the same ContextParallel, the object"
        ):
            appended(cache, cp=other)
        return appended(cache).shape

    assert all(Simulator(2).run(work))


def test_a_wider_mask_than_what_was_dropped_for():
    def work(transport):
        cache = df.Cache(df.ContextParallel(transport), batch=1, kv_heads=1, d_qk=8, capacity=8, dtype=torch.float64)
        for _ in range(3):
            appended(cache, mask=df.Window(3))
        with pytest.raises(ValueError, match="keys that the cache keeps no longer: of the 12 tokens so far"):
            appended(cache, 1)
        assert cache.lengths == (12,)
        return appended(cache, mask=df.Window(3)).isfinite().all()

    assert all(Simulator(3).run(work))


def test_a_layout_that_loses_tokens():
    class Loses(df.Contiguous):
        def ranges(self, seq_len, world_size, rank):
            return super().ranges(seq_len, world_size, rank)[: 1 - rank]

    def work(transport):
        cache = df.Cache(
            df.ContextParallel(transport, Loses()), batch=1, kv_heads=1, d_qk=8, capacity=16, dtype=torch.float64
        )
        with pytest.raises(ValueError, match=r"layout: .*hold each of the 4 positions once"):
            appended(cache)
        return cache.lengths

    assert Simulator(2).run(work) == [(0,)] * 2


def test_a_layout_that_cannot_be_hashed():
    """In training it may be one; so it may here."""

    class Listed(Layout):
        __hash__ = None

        def ranges(self, seq_len, world_size, rank):
            return df.Zigzag().ranges(seq_len, world_size, rank)

    check(Problem(), Chunk(5), Step(1), Chunk(3), layout=Listed())
