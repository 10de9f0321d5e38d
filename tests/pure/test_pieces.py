"""Chunks at fixed positions: their owners, which chunks they see, and layouts that do not split them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.geometry import Folded, Geometry, Sharded
from distflash.pieces import Chunks, Gathered, joined, seen, wanted
from tests.strategies import examples, masks

INNER = st.sampled_from([df.Zigzag(), df.Contiguous(), df.Striped()])


@examples(60)
@given(INNER, st.integers(0, 90), st.integers(1, 12), st.integers(1, 9), st.integers(0, 5), st.integers(1, 3))
def test_every_token_is_in_the_chunk_that_says_so(inner, total, size, ranks, start, rows):
    tokens = Sharded(df.WholeChunks(inner, size), total, ranks, start)
    for held, sequences in ((tokens, 1), (Folded(tokens, total + start, rows), rows)):
        chunks = Chunks.of(held, size)
        assert len(chunks) == sequences * -(-total // size)
        assert all(1 <= len(r) <= size for r in chunks.ranges)
        for number, r in enumerate(chunks.ranges):
            local = chunks.local(number)
            positions = held.positions(int(chunks.owners[number]))
            assert positions[local.start : local.stop].tolist() == list(r)
        assert sorted(n for rank in range(ranks) for n in chunks.held_by(rank)) == list(range(len(chunks)))


@pytest.mark.parametrize(
    ("layout", "seq_len", "ranks"),
    [(df.Striped(), 64, 2), (df.Zigzag(), 64, 8), (df.Contiguous(), 66, 2), (df.Balanced(df.Causal(), chunk=8), 72, 4)],
    ids=repr,
)
def test_layouts_that_cut_elsewhere_are_refused(layout, seq_len, ranks):
    words = r"layout: reproducible .* chunks of 8 tokens .* tokens \d+ to \d+ are on ranks \[0.*df.WholeChunks"
    with pytest.raises(ValueError, match=words):
        Chunks.of(Sharded(layout, seq_len, ranks), 8)


@pytest.mark.parametrize(
    ("layout", "seq_len", "ranks"),
    [(df.Striped(), 61, 1), (df.Zigzag(), 61, 1), (df.Zigzag(), 64, 4), (df.Contiguous(), 64, 8)],
    ids=repr,
)
def test_layouts_that_happen_to_deal_whole_chunks_are_taken(layout, seq_len, ranks):
    assert len(Chunks.of(Sharded(layout, seq_len, ranks), 8)) == 8


@st.composite
def cut(draw):
    seq_len, size, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    layout = df.WholeChunks(draw(INNER), size)
    return Geometry.of_sequence(draw(masks(seq_len)), layout, seq_len, ranks), size


@examples(60)
@given(cut())
def test_chunks_see_each_other_where_any_of_their_tokens_do(given_):
    geometry, size = given_
    chunks = Chunks.of(geometry.queries, size)
    sees = seen(geometry, chunks, chunks)
    positions = torch.arange(geometry.seq_len)
    visible = geometry.mask.materialize(positions, positions, geometry.seq_len).reshape(geometry.seq_len, -1)
    expected = [[bool(visible[a.start : a.stop, b.start : b.stop].any()) for b in chunks.ranges] for a in chunks.ranges]
    assert sees.tolist() == expected
    for rank, numbers in enumerate(wanted(sees, chunks.owners, geometry.world_size)):
        own = chunks.held_by(rank)
        assert numbers == [m for m in range(len(chunks)) if any(expected[n][m] for n in own)]


@given(st.lists(st.integers(0, 20), unique=True, min_size=1).map(sorted))
def test_gathered_tokens_count_like_a_sequence(numbers):
    ranges = joined(range(3 * n, 3 * n + 3) for n in numbers)
    assert all(a.stop < b.start for a, b in pairwise(ranges))
    tokens, positions = Gathered(ranges), [p for n in numbers for p in range(3 * n, 3 * n + 3)]
    assert tokens.positions(0).tolist() == positions and tokens.length(0) == len(positions)
    asked = torch.arange(-2, 70)
    assert tokens.count_below(asked, 0).tolist() == [sum(p < a for p in positions) for a in asked.tolist()]
