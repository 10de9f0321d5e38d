"""Prefill in chunks and decode over simulated ranks: equal to dense attention over the whole sequence."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.transport import Simulator
from tests.dense import Problem
from tests.growing import (
    Chunk,
    Lopsided,
    MakeRoom,
    New,
    Reorder,
    Script,
    Step,
    Truncate,
    assert_as_exact,
    assert_exact,
    on_ranks,
    told,
    with_dtype,
)
from tests.strategies import SCHEDULES, examples, masks, patterns

MOST = 40
LAYOUTS = st.sampled_from([df.Contiguous(), df.Zigzag(), df.Striped(), Lopsided()])
WAYS = st.sampled_from([*SCHEDULES, df.Ulysses(df.Ring())])
SMALL_TILES = df.kernels.Reference(block_q=5, block_k=7)


@st.composite
def forgetful(draw):
    """A mask under which keys are dropped, and how many of them later tokens may see."""
    left, first, size = draw(st.integers(0, 9)), draw(st.integers(0, 3)), draw(st.integers(1, 9))
    window = df.Window(left)
    return draw(
        st.sampled_from(
            [
                (window, left),
                (df.Causal() & (df.FirstTokens(first) | window), left + first),
                (df.Chunked(size) & df.Causal(), size - 1),
                (df.Chunked(size) & window, min(left, size - 1)),
                ((df.Chunked(size) | window) & df.Causal(), max(left, size - 1)),
            ]
        )
    )


@st.composite
def first_chunks(draw, tokens):
    """Masks by which tokens of the first chunk see one another both ways."""
    cuts = sorted(draw(st.sets(st.integers(0, tokens), min_size=2, max_size=2))) if tokens else [0, 0]
    image = df.ImageBlocks(cuts[:1], [cuts[1] - cuts[0]]) if cuts[1] > cuts[0] else df.Causal()
    prefix = df.PrefixLM(draw(st.integers(0, tokens)))
    window = df.Causal() & df.Window(draw(st.integers(0, 9)))
    return draw(st.sampled_from([image, prefix, prefix | window, image & df.Window(draw(st.integers(0, 9)), tokens)]))


@st.composite
def problems(draw, mask):
    kv_heads = draw(st.sampled_from([1, 1, 2, 3]))
    return Problem(
        mask=mask,
        seq_len=MOST,
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        d_qk=draw(st.sampled_from([1, 8])),
        d_v=draw(st.sampled_from([8, 5])),
        scale=draw(st.sampled_from([None, 1.0, -0.3])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


class Lengths:
    """What a cache may be asked for next. Tokens below ``least`` are not taken back: later ones need what they saw."""

    def __init__(self, batch, first, capacity, tight):
        self.now, self.least, self.first, self.capacity, self.tight = (
            [0] * batch,
            [first] * batch,
            first,
            capacity,
            tight,
        )

    def append(self, tokens, row):
        rows = range(len(self.now)) if row is None else [row]
        for n in rows:
            if self.tight:
                self.least[n] = max(self.least[n], self.now[n])
            self.now[n] += tokens

    def room(self, row):
        longest = max(self.now) if row is None else self.now[row]
        return min(MOST - longest, self.tight) if self.tight else MOST - longest


@st.composite
def actions(draw, lengths, batch, alike):
    """A script of up to 10 actions after the first chunk. alike: whether all sequences have one mask."""
    done = []
    if lengths.first:
        done.append(Chunk(lengths.first))
        lengths.append(lengths.first, None)
    elif draw(st.booleans()):
        for row in range(batch):
            tokens = draw(st.integers(0, min(13, lengths.room(row))))
            done.append(Chunk(tokens, row))
            lengths.append(tokens, row)
    for _ in range(draw(st.integers(1, 10))):
        row = draw(st.none() | st.integers(0, batch - 1))
        room = lengths.room(row)
        kind = draw(st.sampled_from(["chunk", "chunk", "step", "step", "truncate", "reorder", "room"]))
        if kind == "chunk":
            done.append(Chunk(min(room, draw(st.sampled_from([0, 1, 1, 2, 3, 5, 7, 16]))), row))
        elif kind == "step":
            tokens = min(room, draw(st.integers(1, 5)))
            done.append(Step(tokens, row) if tokens else Chunk(0, row))
        elif kind == "truncate":
            to = [draw(st.integers(min(a, b), b)) for a, b in zip(lengths.least, lengths.now, strict=True)]
            lengths.now = to
            done.append(Truncate(tuple(to)))
        elif kind == "reorder":
            if MakeRoom() in done and not alike:
                continue  # a sequence would come under a mask for which its keys have not been kept
            order = draw(st.tuples(*[st.integers(0, batch - 1)] * batch))
            lengths.now, lengths.least = ([each[n] for n in order] for each in (lengths.now, lengths.least))
            done.append(Reorder(order))
        else:
            lengths.least = list(lengths.now)
            done.append(MakeRoom())
        if kind in ("chunk", "step"):
            lengths.append(done[-1].tokens, row)
    return (*done, Chunk(min(lengths.room(None), 3)))


@st.composite
def scripts(draw):
    first = draw(st.sampled_from([0, 0, 1, 6, 11]))
    kind = draw(st.sampled_from(["any", "any", "forgetful", "first"]))
    tight = None
    if kind == "forgetful":
        mask, seen = draw(forgetful())
        tight = draw(st.integers(1, 6))
    elif kind == "first":
        mask = draw(first_chunks(first))
    else:
        mask = draw(masks(MOST) | patterns(MOST)) & df.Causal()
    p = draw(problems(mask))
    if kind == "any" and draw(st.booleans()):
        p = replace(p, mask=df.Rows([mask, *(draw(masks(MOST)) & df.Causal() for _ in range(p.batch - 1))]))
    capacity = MOST if tight is None else seen + tight
    first = first if kind == "first" else 0
    return Script(
        p, draw(actions(Lengths(p.batch, first, capacity, tight), p.batch, not isinstance(p.mask, df.Rows))), capacity
    )


@examples(30)
@given(scripts(), LAYOUTS, st.integers(1, 8), WAYS)
def test_exact_in_float64(script, layout, world_size, schedule):
    x = told(script)
    assert_exact(script, x, on_ranks(script, x, world_size, layout, schedule=schedule, kernel=SMALL_TILES))


@examples(15)
@given(scripts(), LAYOUTS, st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_less_exact_than_dense(script, layout, world_size, dtype):
    script = with_dtype(script, dtype)
    x = told(script)
    assert_as_exact(script, x, on_ranks(script, x, world_size, layout))


def small(transport=None, **changes):
    cp = None if transport is None else df.ContextParallel(transport)
    return df.Cache(cp, **dict(batch=2, kv_heads=1, d_qk=8, capacity=12, dtype=torch.float64) | changes)


def tokens(n=1, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, 1, 8, dtype=torch.float64, generator=generator)


def step(cache, seed=0, **arguments):
    return df.decode(*[tokens(batch=cache.batch, seed=seed)] * 3, cache=cache, **arguments)


def test_memory():
    def work(transport):
        cache = small(transport, batch=3, capacity=13, kv_heads=2, d_v=5, dtype=torch.bfloat16)
        return cache.nbytes, cache.store.room, cache.batch, cache.capacity

    room = 4
    of_keys, counts = 3 * room * 2 * (8 + 5) * 2, 3 * 4 * 4
    for nbytes, *rest in Simulator(4).run(work):
        assert rest == [room, 3, 13] and nbytes == of_keys + 3 * room * 4 + counts + 3 * 4


def test_integers_of_any_kind():
    cache = small(batch=np.int64(2), kv_heads=torch.tensor(1), d_qk=torch.tensor([8]), capacity=np.uint8(12))
    assert cache.store.k.shape == (2, 12, 1, 8) and cache.capacity == 12 and type(cache.capacity) is int
    for n in range(6):
        step(cache, n)
    for lengths, expected in (
        (np.int32(5), (5, 5)),
        (torch.tensor(4), (4, 4)),
        (torch.tensor([3, 4]), (3, 4)),
        (np.array([3, 2]), (3, 2)),
        ([np.int64(1), 2], (1, 2)),
        (2, (1, 2)),
    ):
        cache.truncate(lengths)
        assert cache.lengths == expected
    for indices, expected in ((torch.tensor([1, 0]), (2, 1)), (np.array([0, 0]), (2, 2)), ((1, np.int8(1)), (2, 2))):
        cache.reorder(indices)
        assert cache.lengths == expected
    assert cache[np.int64(1)].rows == cache[torch.tensor(1)].rows == cache[-1].rows == range(1, 2)


@pytest.mark.parametrize(
    "length", [-1, None, 2.0, "2", True, [1], [1, -1], [1, None], torch.tensor(1.0), [1.5, 1], 4, [3, 4]]
)
def test_lengths_that_are_refused(length):
    cache = small()
    for n in range(3):
        step(cache, n)
    with pytest.raises(ValueError, match="length: expected "):
        cache.truncate(length)
    assert cache.lengths == (3, 3)


@pytest.mark.parametrize("indices", [0, None, [0], [0, 2], [0, -1], [0, 1.0], [True, False], "01", torch.zeros(2, 1)])
def test_indices_that_are_refused(indices):
    with pytest.raises(ValueError, match="indices: expected 2 integers from 0 to 1"):
        small().reorder(indices)


@pytest.mark.parametrize("name", ["batch", "kv_heads", "d_qk", "d_v", "capacity"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, torch.zeros(2)])
def test_sizes_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an int of at least 1, got "):
        small(**{name: value})


def test_other_arguments_that_are_refused():
    with pytest.raises(ValueError, match=r"dtype: expected float16, bfloat16, float32 or float64, got torch\.int32"):
        small(dtype=torch.int32)
    with pytest.raises(ValueError, match="cp: expected a ContextParallel"):
        df.Cache("cp", batch=1, kv_heads=1, d_qk=8, capacity=8)
    for sequence in (2, -3, slice(1), "0"):
        with pytest.raises(IndexError, match=r"sequence: expected an int from -2 to 1, got"):
            small()[sequence]


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_inference_mode(made, used):
    """Made under it and used outside, and the other way round; then outside of both."""

    def work(transport):
        with torch.inference_mode(made):
            cache = small(transport)
        with torch.inference_mode(used):
            x = cache.cp.shard(tokens(5))
            df.attention(x, x, x, mask=df.Causal(), cp=cache.cp, cache=cache, seq_len=5)
            step(cache)
        cache.truncate(4)
        cache.reorder([1, 0])
        return df.attention(x[:, :0], x[:, :0], x[:, :0], mask=df.Causal(), cp=cache.cp, cache=cache, seq_len=0), step(
            cache
        )

    for empty, out in Simulator(2).run(work):
        assert empty.shape[1] == 0 and not out.isnan().any()


def test_plans_that_were_made_under_inference_mode_serve_training():
    def work(transport):
        cp = df.ContextParallel(transport)
        x, mask = cp.shard(tokens(6)), df.Causal()
        with torch.inference_mode():
            df.attention(x, x, x, mask=mask, cp=cp, cache=_cache(cp), seq_len=6)
        q = x.clone().requires_grad_()
        df.attention(q, q, q, mask=mask, cp=cp, seq_len=6).sum().backward()
        return q.grad.isfinite().all()

    assert all(Simulator(2).run(work))


def _cache(cp):
    return df.Cache(cp, batch=2, kv_heads=1, d_qk=8, capacity=12, dtype=torch.float64)


def test_a_copy_goes_on_by_itself():
    """A prompt's cache is copied for each continuation of it."""

    def work(transport):
        cache = small(transport)
        x = cache.cp.shard(tokens(5))
        df.attention(x, x, x, mask=df.Causal(), cp=cache.cp, cache=cache, seq_len=5)
        other = copy.deepcopy(cache)
        first, again = step(cache, 1), step(cache, 2)
        assert other.lengths == (5, 5) and other.cp is cache.cp
        assert torch.equal(step(other, 1), first) and torch.equal(step(other, 2), again)
        other.truncate(3)
        assert cache.lengths == (7, 7) and cache.ledgers()[0].total == 7
        one = copy.deepcopy(cache[1])
        assert torch.equal(step(one), step(cache[1]))
        return True

    assert all(Simulator(2).run(work))


def test_it_cannot_be_pickled():
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(small())


def test_a_sequence_and_the_whole_are_one_memory():
    """Each sees what is done to the other, however they alternate."""

    def work(transport):
        cache = small(transport)
        one, other = cache[0], cache[1]
        step(one)
        step(cache, 1)
        step(other, 2)
        other.truncate(1)
        assert cache.lengths == (2, 1) and one.length == 2 and other.lengths == (1,)
        cache.reorder([1, 0])
        assert (one.length, other.length) == (1, 2) and cache[1][0].length == 2
        with pytest.raises(ValueError, match="different tokens"):
            df.decode(*[tokens(batch=1, seed=cache.cp.rank)] * 3, cache=one)
        assert cache.lengths == (1, 2) and other.lengths == (2,)
        step(cache)
        assert cache.lengths == (2, 3)
        return [c.length for c in cache]

    assert Simulator(2).run(work) == [[2, 3]] * 2


def test_tensors_of_any_strides():
    p = Problem(batch=2, heads=4, kv_heads=2, d_qk=8, d_v=5)
    script = Script(p, (Chunk(7), Step(2), Chunk(3), Step(1)), 20)
    x = told(script)
    turned = [
        None if new is None else New(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (new.q, new.k, new.v)))
        for new in x.news
    ]
    assert_exact(script, x, on_ranks(script, replace(x, news=tuple(turned)), 3, df.Zigzag()))


def test_two_caches_and_two_groups_at_a_time():
    """Of two layers, and of a draft's model with a group of its own, whose calls alternate."""

    def work(transport):
        caches = [small(transport), small(transport)]
        caches.append(_cache(caches[0].cp))
        together = [[step(cache, n) for cache in caches] for n in range(4)]
        alone = small(transport)
        return all(torch.equal(out, step(alone, n)) for n, outs in enumerate(together) for out in outs[:1]), together

    for same, together in Simulator(3).run(work):
        assert same and all(torch.equal(out, outs[0]) for outs in together for out in outs)
