"""Decoding: known bugs of other implementations, each with a test named after it, and errors."""

import math

import pytest
import torch

import distflash as df
from distflash.decode_step import MOST_TOKENS
from distflash.transport import Simulator
from tests.dense import Problem
from tests.growing import (
    Chunk,
    MakeRoom,
    Reorder,
    Script,
    Step,
    Truncate,
    assert_exact,
    by_definition,
    on_rank,
    on_ranks,
    poison,
    told,
)

CAUSAL, ZIGZAG = df.Causal(), df.Zigzag()
LAYOUTS = [df.Contiguous(), df.Zigzag(), df.Striped()]
TINY = df.Causal() & (df.FirstTokens(2) | df.Window(5))


def check(problem, *actions, world_size=3, layout=ZIGZAG, capacity=64):
    script = Script(problem, actions, capacity)
    x = told(script)
    assert_exact(script, x, on_ranks(script, x, world_size, layout))


def cache_of(transport=None, batch=1, capacity=32, mask=CAUSAL, prompt=0):
    """A cache of one key head of 8 dims in float64, after so many tokens."""
    cp = None if transport is None else df.ContextParallel(transport)
    cache = df.Cache(cp, batch=batch, kv_heads=1, d_qk=8, capacity=capacity, dtype=torch.float64)
    poison(cache)
    if prompt:
        x = cache.cp.shard(torch.ones(batch, prompt, 1, 8, dtype=torch.float64))
        df.attention(x, x, x, mask=mask, cp=cache.cp, cache=cache, seq_len=prompt)
    return cache


def tokens(n=1, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, 1, 8, dtype=torch.float64, generator=generator)


def test_log_base():
    """The state of a softmax travels in natural units: merged as of another base, both out and lse are wrong."""
    p = Problem(heads=4, kv_heads=2, scale=1.0, sinks=True)
    check(p, Chunk(17), Step(1), Step(1), world_size=4)
    script = Script(p, (Chunk(17), Step(1)), 64)
    x = told(script)
    lse = on_ranks(script, x, 4, df.Striped())[-1]["lse"]
    truth = by_definition(script, x, torch.float64)[-1]["lse"]
    assert (lse - truth).abs().max() < 1e-12 < (lse - truth / math.log(2)).abs().min()


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("sinks", [False, True])
def test_a_rank_without_a_visible_key(layout, sinks):
    """Ranks that keep no key at all, and ranks of whose keys a window shows none."""
    p = Problem(heads=2, sinks=sinks, mask=df.Window(1))
    check(p, Step(1), Step(1), Step(2), world_size=8, layout=layout)
    check(p, Chunk(40), Step(1), Step(1), world_size=8, layout=layout)


def test_no_rank_with_a_visible_key():
    """Only the sinks then: out 0. Without them lse is -inf."""
    for sinks in (False, True):
        p = Problem(mask=df.FirstTokens(0) & df.Causal(), sinks=sinks)
        check(p, Chunk(5), Step(2), world_size=3)
        script = Script(p, (Chunk(5), Step(2)), 64)
        got = on_ranks(script, told(script), 3, df.Zigzag())[-1]
        assert (got["out"] == 0).all() and (got["lse"] == -torch.inf).all() != sinks


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_several_new_tokens_whose_ends_differ_by_query_and_rank(layout):
    """The first of five tokens must not see the keys of the others, which other ranks keep."""
    for mask in (df.Causal(), df.Window(3), df.Chunked(4) & df.Causal(), TINY):
        check(Problem(mask=mask, heads=2), Chunk(11), Step(5), Step(4), Step(5), world_size=4, layout=layout)


def test_lengths_after_rejected_drafts():
    """The next tokens take the places of those that were rejected, each sequence another number."""
    drafts = (Step(5), Truncate((12, 14, 16)), Step(1), Truncate((13, 15, 12)), Step(3))
    for mask in (df.Causal(), df.Window(6), TINY):
        p = Problem(mask=mask, batch=3, heads=2, alibi=True)
        check(p, Chunk(11), *drafts, world_size=3)
        check(p, Chunk(11), MakeRoom(), *drafts, world_size=4)


def test_rejected_drafts_in_a_cache_that_is_full():
    """What a window no longer shows is dropped for drafts, but not before they are accepted what they alone pass by."""
    p = Problem(mask=df.Window(6), batch=2)
    drafts = [action for n in range(1, 6) for action in (Step(4), Truncate(7 + 2 * n))]
    check(p, Chunk(7), *drafts, capacity=10, world_size=3)


def test_prompts_of_unequal_length():
    """Prefilled one by one, decoded together."""
    p = Problem(batch=3, heads=4, kv_heads=2, alibi=True, mask=df.Causal())
    check(p, Chunk(13, 0), Chunk(1, 1), Chunk(6, 2), Step(1), Step(2), Step(1), world_size=3)


def test_beams():
    """Which begin with one prompt, and go on with the tokens of another; all take the same one, and swap."""
    p = Problem(batch=3, mask=df.Causal())
    check(p, Chunk(9, 0), Reorder((0, 0, 0)), Step(1), Reorder((2, 2, 1)), Step(1), Reorder((1, 0, 2)), Step(2))


@pytest.mark.parametrize("size", range(1, 8))
def test_a_window_that_wraps(size):
    """Memory for the window and the new token alone: one key dropped too early, or too late, and a step fails."""
    p = Problem(mask=df.Window(size - 1), heads=2)
    steps = [Step(1)] * 17
    check(p, *steps, capacity=size, world_size=3)
    check(p, Chunk(1), *steps, capacity=size, world_size=1)


def test_positions():
    """Distances are those of the sequence, also of keys that came in other chunks, or behind some that were dropped."""
    check(Problem(mask=df.Window(5), alibi=True, heads=3), Chunk(9), Chunk(3), MakeRoom(), Step(2), Chunk(4), Step(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_valid_part_is_read(dtype):
    """What stands behind the keys that there are may be anything: NaN here, from before and of rejected tokens."""
    p = Problem(dtype=dtype, batch=2)
    script = Script(p, (Chunk(9, 0), Chunk(2, 1), Step(1), Truncate((4, 3)), Step(1)), 40)

    def work(transport):
        return on_rank(script, told(script), df.ContextParallel(transport))

    for results in Simulator(3).run(work):
        assert all(not x.isnan().any() for of_call in results for x in of_call.values())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_same_bits_on_all_ranks_and_in_each_run(world_size):
    script = Script(Problem(dtype=torch.bfloat16, heads=4, sinks=True, softcap=2.0), (Chunk(19), *[Step(1)] * 5), 40)
    x = told(script)
    first, second = (on_ranks(script, x, world_size, df.Zigzag()) for _ in range(2))
    assert all(torch.equal(a["out"], b["out"]) for a, b in zip(first, second, strict=True))


def test_each_key_is_kept_by_the_rank_that_has_fewest():
    def work(transport):
        cache, kept = cache_of(transport), []
        for n in range(9):
            df.decode(*[tokens()] * 3, cache=cache)
            kept.append(cache.kept())
            assert sum(sum(cache.kept(rank)) for rank in range(4)) == n + 1
        return kept[-1]

    assert Simulator(4).run(work) == [(3,), (2,), (2,), (2,)]


def test_tokens_that_differ_between_ranks():
    """One error on every rank, and the cache as it was."""

    def work(transport):
        cache = cache_of(transport, prompt=7)
        with pytest.raises(ValueError, match="q: ranks have different tokens"):
            df.decode(tokens(seed=int(cache.cp.rank == 1)), tokens(), tokens(), cache=cache)
        assert cache.lengths == (7,) and cache.store.lengths.tolist() == [7]
        return df.decode(*[tokens()] * 3, cache=cache), df.decode(*[tokens(2)] * 3, cache=cache)

    def undisturbed(transport):
        cache = cache_of(transport, prompt=7)
        return df.decode(*[tokens()] * 3, cache=cache), df.decode(*[tokens(2)] * 3, cache=cache)

    for got, expected in zip(Simulator(3).run(work), Simulator(3).run(undisturbed), strict=True):
        assert all(map(torch.equal, got, expected))


WRONG = {
    "capacity exceeded": (
        dict(n=3),
        "cache: 3 more tokens do not fit beside the 30 that are kept .* of 30; .*capacity=32",
    ),
    "no tokens": (dict(n=0), "q: 0 new tokens; expected 1 to 64"),
    "a chunk": (dict(n=MOST_TOKENS + 1), "q: 65 new tokens; expected 1 to 64, .*df.attention"),
    "another dtype": (dict(change=torch.Tensor.float), "k: is torch.float32 on cpu, the cache torch.float64"),
    "another batch": (dict(batch=2), "k: is for 2 sequences with 1 heads of 8, the cache for 1"),
    "other heads": (dict(change=lambda x: x.repeat(1, 1, 2, 1)), "k: is for 1 sequences with 2 heads of 8"),
    "another head dim": (dict(change=lambda x: x[..., :4].contiguous()), "k: is for 1 sequences with 1 heads of 4"),
    "a gradient": (dict(change=torch.Tensor.requires_grad_), "q, k, v, sinks: require a gradient"),
    "a learned sink": (dict(sinks=torch.zeros(1, requires_grad=True)), "q, k, v, sinks: require a gradient"),
    "keys to come": (dict(mask=df.Full()), "mask: Full.* see keys that come after it"),
    "keys to come in a batch": (dict(n=2, mask=df.Window(3, 1)), "mask: Window.* see keys that come after it"),
    "no mask": (dict(mask=None), "mask: expected"),
    "a mask that knows fewer tokens": (
        dict(mask=df.Documents([0, 30])),
        "mask: .*for a sequence of 30 tokens, .* has 31",
    ),
    "masks for two sequences": (dict(mask=df.Rows([df.Causal()] * 2)), "mask: Rows of 2 masks for a batch of 1"),
    "softcap": (dict(softcap=-1.0), "softcap"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_and_the_cache_as_it_was(name):
    change, words = WRONG[name]

    def wrong(cache, n=1, batch=1, change=lambda x: x, **arguments):
        x = change(tokens(n, batch))
        with pytest.raises(ValueError, match=words):
            df.decode(x, x, x, cache=cache, **arguments)

    def work(transport, refused):
        cache = cache_of(transport, prompt=30)
        if refused:
            wrong(cache, **change)
            assert cache.lengths == (30,)
        return df.decode(*[tokens(2)] * 3, cache=cache)

    got, expected = (Simulator(2).run(lambda t, refused=refused: work(t, refused)) for refused in (True, False))
    assert all(map(torch.equal, got, expected))


def test_a_wider_mask_than_what_was_dropped_for():
    def work(transport):
        cache = cache_of(transport, capacity=8, prompt=7, mask=df.Window(3))
        for n in range(5):
            df.decode(*[tokens(seed=n)] * 3, cache=cache, mask=df.Window(3))
        for mask in (df.Causal(), df.Window(9), df.FirstTokens(1) | df.Window(2)):
            with pytest.raises(
                ValueError, match=r"mask: .* keys that the cache keeps no longer: of the 12 tokens so far"
            ):
                df.decode(*[tokens()] * 3, cache=cache, mask=mask & df.Causal())
        return df.decode(*[tokens()] * 3, cache=cache, mask=df.Window(2)).isfinite().all()

    assert all(Simulator(3).run(work))


def test_not_a_cache():
    with pytest.raises(ValueError, match=r"cache: expected a df.Cache, got None"):
        df.decode(*[tokens()] * 3, cache=None)
