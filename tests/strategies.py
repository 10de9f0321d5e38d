"""Hypothesis strategies for masks, layouts and whole attention problems."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st

import distflash as df
from distflash.geometry import Geometry, Sharded
from tests.dense import Problem
from tests.oracle import Blind


def examples(count: int) -> settings:
    """The number of examples of a test; ten times as many with ``--full``."""
    return settings(
        max_examples=count * settings.default.max_examples // settings.get_profile("distflash").max_examples
    )


LAYOUTS = [
    df.Contiguous(),
    df.Zigzag(),
    df.Striped(),
    df.Balanced(df.Causal(), chunk=3),
    df.Balanced(df.Causal() & df.Chunked(7), chunk=2, tokens=9.0),
]
layouts = st.sampled_from(LAYOUTS)


@st.composite
def documents(draw, seq_len: int) -> df.Documents:
    cuts = draw(st.sets(st.integers(1, seq_len - 1), max_size=6)) if seq_len > 1 else set()
    return df.Documents([0, *sorted(cuts), seq_len])


@st.composite
def blinds(draw, seq_len: int) -> Blind:
    start, stop = sorted(draw(st.tuples(*[st.integers(0, seq_len + 1)] * 2)))
    return Blind(start, stop)


def simple_masks(seq_len: int) -> st.SearchStrategy[df.Mask]:
    """Every kind of mask, and one that leaves rows empty. Numbers reach past the sequence."""
    numbers = st.integers(0, seq_len + 2)
    kinds = [
        st.just(df.Full()),
        st.just(df.Causal()),
        st.builds(df.Window, numbers, numbers),
        st.builds(df.PrefixLM, numbers),
        st.builds(df.Chunked, st.integers(1, seq_len + 2)),
        blinds(seq_len),
    ]
    return st.one_of(*kinds, *([documents(seq_len)] if seq_len else []))


def masks(seq_len: int) -> st.SearchStrategy[df.Mask]:
    """Masks, their intersections and unions, and these nested once more."""
    one = simple_masks(seq_len)
    two = one | combinations(one, one)
    return one | two | combinations(two, one) | combinations(one, two)


@st.composite
def patterns(draw, seq_len: int) -> df.Mask:
    """Masks of particular models, alone and beside others."""
    numbers = st.integers(0, seq_len + 2)
    cuts = sorted(draw(st.sets(numbers, max_size=6)))
    lengths = [
        stop - start for start, stop in zip([0, *cuts], [*cuts, seq_len], strict=True) if start < stop <= seq_len
    ]
    lengths += [seq_len - sum(lengths)]
    parents = [draw(st.integers(-1, n - 1)) for n in range(len(lengths))]
    one = draw(
        st.sampled_from(
            [
                df.FirstTokens(draw(numbers)),
                df.BlockCausal(draw(numbers) + 1),
                df.BlockCausal([0, *[cut for cut in cuts if 0 < cut < seq_len], seq_len]),
                df.ImageBlocks(cuts[:-1:2], [stop - start for start, stop in zip(cuts[::2], cuts[1::2], strict=False)]),
                df.Tree(parents, lengths),
            ]
        )
    )
    return draw(st.just(one) | combinations(st.just(one), simple_masks(seq_len)))


def combinations(a: st.SearchStrategy[df.Mask], b: st.SearchStrategy[df.Mask]) -> st.SearchStrategy[df.Mask]:
    return st.builds(lambda a, b: a & b, a, b) | st.builds(lambda a, b: a | b, a, b)


@dataclass(frozen=True)
class Nodes(df.DoubleRing):
    """A double ring whose nodes have the largest number of ranks up to ``most`` that divides the world size."""

    most: int = 2

    def _per_node(self, world_size: int) -> int:
        return max(n for n in range(1, self.most + 1) if world_size % n == 0)


SCHEDULES = [
    df.Ring(),
    df.AllGather(1),
    df.AllGather(2),
    df.AllGather(5),
    df.DoubleRing(),
    Nodes(most=2),
    Nodes(most=4),
    df.PassQuery(),
]
schedules = st.sampled_from(SCHEDULES)


def rows(seq_len: int, count: int) -> st.SearchStrategy[df.Rows]:
    """Masks for ``count`` sequences of a batch, some of them combined with one for all."""
    one = masks(seq_len) | patterns(seq_len)
    each = st.lists(one, min_size=count, max_size=count).map(df.Rows)
    return each | combinations(each, simple_masks(seq_len)) | combinations(simple_masks(seq_len), each)


@st.composite
def geometries(draw, max_world: int = 8) -> Geometry:
    """Self-attention, and queries that are some of the keys' tokens, in another layout."""
    seq_len, world_size = draw(st.integers(0, 40)), draw(st.integers(1, max_world))
    geometry = Geometry.of_sequence(draw(masks(seq_len) | patterns(seq_len)), draw(layouts), seq_len, world_size)
    if draw(st.booleans()):
        return geometry
    start = draw(st.integers(0, seq_len))
    queries = Sharded(draw(layouts), draw(st.integers(0, seq_len - start)), world_size, start)
    return replace(geometry, queries=queries)


@st.composite
def problems(draw, max_seq_len: int = 40) -> Problem:
    seq_len = draw(st.integers(0, max_seq_len))
    kv_heads = draw(st.integers(1, 8))
    return Problem(
        mask=draw(masks(seq_len) | patterns(seq_len)),
        seq_len=seq_len,
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3 if kv_heads < 4 else 2)),
        kv_heads=kv_heads,
        d_qk=draw(st.sampled_from([1, 8, 12])),
        d_v=draw(st.sampled_from([1, 8, 5])),
        scale=draw(st.sampled_from([None, 1.0, -0.3])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def dropped(draw, problem: st.SearchStrategy[Problem]) -> Problem:
    """Problems with attention dropout."""
    seed = draw(st.sampled_from([0, 1, -(2**63), 2**63 - 1, 0x123456789ABCDEF0]))
    return replace(draw(problem), dropout_p=draw(st.sampled_from([0.1, 0.5, 0.99])), dropout_seed=seed)


@st.composite
def problems_of_rows(draw) -> Problem:
    """Batches whose sequences have masks of their own."""
    p = draw(problems(max_seq_len=20))
    batch = draw(st.integers(1, 4))
    return replace(p, batch=batch, mask=draw(rows(p.seq_len, batch)))


@st.composite
def chunks(draw) -> Problem:
    """Queries that are other tokens than the keys: a chunk of them, or under `Full` any others; keys in any layout."""
    p = draw(problems())
    p = replace(p, kv_layout=draw(st.none() | layouts))
    if draw(st.integers(0, 2)) == 0:
        return replace(p, mask=df.Full(), q_start=draw(st.integers(0, 60)), q_len=draw(st.integers(0, 60)))
    start = draw(st.integers(0, p.seq_len))
    return replace(p, q_start=start, q_len=draw(st.integers(0, p.seq_len - start)))
