"""Prefill and decode on real processes: exact, the same bits on all ranks, one error on every rank."""

import re

import pytest
import torch
import torch.distributed as dist

import distflash as df
from distflash.kernels import Reference
from tests.dense import Problem
from tests.growing import (
    Chunk,
    Lopsided,
    MakeRoom,
    Reorder,
    Script,
    Step,
    Truncate,
    assert_as_exact,
    assert_exact,
    joined,
    on_rank,
    told,
    with_dtype,
)
from tests.poison import poison_memory

WINDOW = df.Causal() & (df.FirstTokens(2) | df.Window(5))
SCRIPTS = {
    "causal": Script(
        Problem(heads=4, kv_heads=2, batch=2, d_v=5, sinks=True),
        (Chunk(17), Step(1), Chunk(1), Step(3), Truncate((19, 18)), Step(1), Reorder((1, 1)), Step(2), Chunk(2)),
        40,
    ),
    "unequal prompts": Script(
        Problem(heads=3, batch=3, alibi=True, softcap=2.0, mask=df.Rows([df.Causal(), df.Window(4), df.Causal()])),
        (Chunk(11, 0), Chunk(1, 1), Chunk(5, 2), Step(1), Step(2), Chunk(7), Truncate(6), Step(1)),
        40,
    ),
    "a window in little memory": Script(
        Problem(mask=WINDOW, heads=2, alibi=True),
        (Chunk(9), Chunk(9), *[Step(1)] * 5, MakeRoom(), Step(2), Truncate(24), Step(1), Chunk(9)),
        16,
    ),
}


def part(script, layout, schedule):
    """Runs as a rank."""
    poison_memory()
    cp = df.ContextParallel(dist.group.WORLD, layout, schedule, Reference())
    return on_rank(script, told(script), cp)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_exact(world_size, name, ranks_of):
    """In float64 to its rounding; in bfloat16 as exact as dense float32 with the same roundings."""
    script, ranks = SCRIPTS[name], ranks_of(world_size)
    for layout, schedule in ((df.Zigzag(), df.Ring()), (Lopsided(), df.AllGather()), (df.Striped(), df.PassQuery())):
        assert_exact(script, told(script), joined(script, ranks.run(part, script, layout, schedule), layout))
    short = with_dtype(script, torch.bfloat16)
    parts = ranks.run(part, short, df.Contiguous(), df.Ring())
    assert_as_exact(short, told(short), joined(short, parts, df.Contiguous()))


def tokens(n=1, seed=0):
    return torch.randn(1, n, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(cache, n=1, change=lambda x: x, **arguments):
    return df.decode(*[change(tokens(n))] * 3, cache=cache, **arguments)


def chunk(cache, n=4, change=lambda x: x, **arguments):
    x = change(cache.cp.shard(tokens(n)))
    given = dict(mask=df.Causal(), cp=cache.cp, cache=cache, seq_len=n) | arguments
    return df.attention(x, x, x, **given)


# Calls of a cache of 16 tokens that has had 9; and what the error says, where all ranks make it and where one does.
BY_ALL = {
    "capacity exceeded by a step": (lambda cache: step(cache, 8), "cache: 8 more tokens do not fit beside the 9"),
    "capacity exceeded by a chunk": (lambda cache: chunk(cache, 8), "cache: 8 more tokens do not fit beside the 9"),
    "another dtype": (lambda cache: step(cache, change=torch.Tensor.float), "k: is torch.float32 on cpu, the cache"),
    "a gradient": (lambda cache: chunk(cache, change=torch.Tensor.requires_grad_), "q, k, v, sinks: require a grad"),
    "keys to come": (lambda cache: step(cache, mask=df.Window(3, 2)), "mask: Window.* keys that come after it"),
    "keys to come in a chunk": (lambda cache: chunk(cache, mask=df.Full()), "mask: Full.* keys that come after this"),
}
BY_ONE = {
    "another shape": (
        step,
        lambda cache: step(cache, change=lambda x: x[..., :4]),
        "k: is for 1 sequences with 2 heads",
    ),
    "another dtype": (step, BY_ALL["another dtype"][0], "k: is torch.float32"),
    "another shape in a chunk": (chunk, lambda cache: chunk(cache, change=lambda x: x[:, :, :1]), "k: is for 1 seq"),
    "a gradient": (chunk, BY_ALL["a gradient"][0], "q, k, v, sinks: require a gradient"),
    "another group": (
        chunk,
        lambda cache: chunk(cache, cp=df.ContextParallel(dist.group.WORLD)),
        "cache: was made with",
    ),
}
# Where ranks make calls that are good by themselves, but not the same.
DIFFER = {
    "tokens": (lambda cache: df.decode(*[tokens(seed=cache.cp.rank)] * 3, cache=cache), "q: ranks have different"),
    "masks": (lambda cache: step(cache, mask=df.Window(3 + cache.cp.rank)), ".*mask differs between"),
    "numbers of tokens": (lambda cache: step(cache, 1 + cache.cp.rank), ".*tokens is 1 on rank 0, 2 on rank 1"),
    "a chunk and a step": (
        lambda cache: step(cache) if cache.cp.rank else chunk(cache),
        ".*make different calls: rank 0 the attention over a cache",
    ),
    "scale": (lambda cache: step(cache, scale=1.0 + cache.cp.rank), ".*scale differs between"),
    "mask of a chunk": (lambda cache: chunk(cache, mask=df.Window(cache.cp.rank)), ".*mask differs between"),
}


def call_of(kind, name, rank):
    if kind == "one":
        return BY_ONE[name][rank == 1]
    return {"all": BY_ALL, "differ": DIFFER}[kind][name][0]


def errors(kind, name):
    """Runs as a rank: what it is told, if a wrong call is made, and what a good step then returns."""
    cp = df.ContextParallel(dist.group.WORLD)
    cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=8, capacity=16, dtype=torch.float64)
    chunk(cache, 9)
    words = ""
    if kind is not None:
        with pytest.raises(ValueError) as caught:
            call_of(kind, name, cp.rank)(cache)
        words = str(caught.value)
    assert cache.lengths == (9,) and cache.store.lengths.tolist() == [9]
    return words, step(cache), cache.lengths


def check_errors(ranks, kind, name, words):
    good = ranks.run(errors, None, "")
    for rank, (told_, out, lengths) in enumerate(ranks.run(errors, kind, name)):
        expected = ".*rank 1 refused this call" if kind == "one" and rank != 1 else words
        assert re.match(expected, told_), told_
        assert lengths == (10,) and torch.equal(out, good[rank][1]), "the cache is as it was"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BY_ALL)
def test_wrong_calls_of_all_ranks(name, ranks_of):
    check_errors(ranks_of(2), "all", name, BY_ALL[name][1])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BY_ONE)
def test_a_rank_that_is_wrong_alone_stops_the_others(name, ranks_of):
    check_errors(ranks_of(2), "one", name, BY_ONE[name][2])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", DIFFER)
def test_ranks_that_differ(name, ranks_of):
    check_errors(ranks_of(2), "differ", name, DIFFER[name][1])


def of_other_lengths(smaller):
    """Runs as a rank: what it is told where rank 1 has a smaller cache, or has forgotten more tokens."""
    cp = df.ContextParallel(dist.group.WORLD)
    capacity = 12 if smaller and cp.rank == 1 else 16
    cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=8, capacity=capacity, dtype=torch.float64)
    if not smaller:
        chunk(cache, 9)
        cache.truncate(9 - cp.rank)
    told_ = []
    for call in (step, chunk):
        with pytest.raises(ValueError) as caught:
            call(cache)
        told_.append(str(caught.value))
    return told_


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("smaller", "words"),
    [(True, "capacity is 16 on rank 0, 12 on"), (False, "tokens in the cache (cache.lengths) differs")],
)
def test_caches_that_differ(smaller, words, ranks_of):
    for told_ in ranks_of(2).run(of_other_lengths, smaller):
        assert all(words in text for text in told_), told_
