import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from tests.strategies import layouts

lengths = st.integers(0, 200)
worlds = st.integers(1, 64)
whole_chunks = st.builds(df.WholeChunks, layouts, st.integers(1, 40))


@given(layouts | whole_chunks, lengths, worlds)
def test_every_position_is_held_once_in_ascending_order(layout, seq_len, world_size):
    held = [layout.positions(seq_len, world_size, rank) for rank in range(world_size)]
    assert all(p.dtype == torch.int64 and (p.diff() > 0).all() for p in held)
    assert torch.equal(torch.cat(held).sort().values, torch.arange(seq_len))


@given(layouts, lengths, worlds)
def test_lengths_agree_and_differ_by_at_most_a_token_per_range(layout, seq_len, world_size):
    sizes = [layout.length(seq_len, world_size, rank) for rank in range(world_size)]
    assert sizes == [len(layout.positions(seq_len, world_size, rank)) for rank in range(world_size)]
    ranges = 2 if layout == df.Zigzag() else 1
    assert max(sizes) - min(sizes) <= ranges or getattr(layout, "tokens", "equal") != "equal"


@given(layouts | whole_chunks, lengths, worlds, st.data())
def test_count_below_counts(layout, seq_len, world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    held = layout.positions(seq_len, world_size, rank)
    asked = torch.arange(-3, seq_len + 4)  # outside the sequence too
    counted = layout.count_below(asked, seq_len, world_size, rank)
    assert torch.equal(counted, (held[None, :] < asked[:, None]).sum(1))
    square = asked[: len(asked) // 2 * 2].view(2, -1)
    assert torch.equal(layout.count_below(square, seq_len, world_size, rank), counted[: square.numel()].view(2, -1))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (df.Contiguous(), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]),
        (df.Zigzag(), [[0, 1, 8, 9, 10], [2, 3, 4, 5, 6, 7]]),
        (df.Striped(), [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]),
    ],
    ids=repr,
)
def test_pictures(layout, expected):
    assert [layout.positions(11, 2, rank).tolist() for rank in range(2)] == expected


@given(whole_chunks, lengths, worlds)
def test_whole_chunks_are_on_one_rank(layout, seq_len, world_size):
    for rank in range(world_size):
        chunks, counts = (layout.positions(seq_len, world_size, rank) // layout.chunk).unique(return_counts=True)
        for chunk, count in zip(chunks.tolist(), counts.tolist(), strict=True):
            assert count == min(layout.chunk, seq_len - chunk * layout.chunk)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zigzag", 4), r"WholeChunks\(layout\): expected another layout"),
        ((df.WholeChunks(df.Zigzag(), 2), 4), r"WholeChunks\(layout\): expected another layout"),
        ((df.Zigzag(), 0), r"WholeChunks\(chunk\): expected an int of at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_chunks_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        df.WholeChunks(*arguments)


def causal_work(layout, seq_len, world_size):
    return torch.tensor([(layout.positions(seq_len, world_size, r) + 1).sum() for r in range(world_size)])


@pytest.mark.parametrize("layout", [df.Zigzag(), df.Striped()], ids=repr)
def test_causal_work_is_balanced(layout):
    """Striped ranks differ by one key a query, zigzag ranks not at all where chunks are equal."""
    seq_len, world_size = 1024, 8
    work = causal_work(layout, seq_len, world_size)
    allowed = 0 if layout == df.Zigzag() else world_size * seq_len // world_size
    assert work.max() - work.min() <= allowed
    contiguous = causal_work(df.Contiguous(), seq_len, world_size)
    assert contiguous.max() > 10 * contiguous.min()
