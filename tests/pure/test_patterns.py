import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from tests.strategies import examples


def dense(seq_len, sees):
    return torch.tensor([[bool(sees(i, j)) for j in range(seq_len)] for i in range(seq_len)]).reshape(seq_len, seq_len)


def check(mask, seq_len, sees, data):
    """The mask equals ``sees`` pair by pair, and its parts are disjoint and monotone for any ascending queries."""
    n = torch.arange(seq_len)
    expected = dense(seq_len, sees)
    assert torch.equal(mask.materialize(n, n, seq_len), expected)
    rows = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, max(seq_len - 1, 0)))) if seq_len else []), dtype=torch.int64
    )
    total = torch.zeros(len(rows), seq_len, dtype=torch.int64)
    for lo, hi in mask.parts(rows, seq_len):
        assert lo.dtype == hi.dtype == torch.int64 and lo.shape == hi.shape == rows.shape
        assert (lo.diff() >= 0).all() and (hi.diff() >= 0).all() and (hi >= lo).all()
        total += (n >= lo[:, None]) & (n < hi[:, None])
    assert torch.equal(total, expected[rows].long())  # a pair in two parts would count twice


@given(st.integers(0, 20), st.integers(0, 22), st.data())
def test_first_tokens(seq_len, n, data):
    check(df.FirstTokens(n), seq_len, lambda i, j: j < n, data)


@given(st.integers(0, 20), st.integers(1, 22), st.data())
def test_blocks_of_one_size(seq_len, size, data):
    mask = df.BlockCausal(size)
    check(mask, seq_len, lambda i, j: j // size <= i // size, data)
    assert mask.seq_len is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.data())
def test_blocks_of_unequal_lengths(lengths, data):
    block = [n for n, length in enumerate(lengths) for _ in range(length)]
    mask = df.BlockCausal([sum(lengths[:n]) for n in range(len(lengths) + 1)])
    check(mask, len(block), lambda i, j: block[j] <= block[i], data)
    assert mask.seq_len == len(block)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=6), st.integers(0, 4), st.data())
def test_image_blocks(pairs, rest, data):
    """Text, image, text, image, ... and text at the end."""
    image, starts = [], []
    for n, (text, length) in enumerate(pairs):
        image += [None] * text
        starts.append(len(image))
        image += [n] * length
    image += [None] * rest
    mask = df.ImageBlocks(starts, [length for _, length in pairs])
    check(mask, len(image), lambda i, j: j <= i or (image[i] is not None and image[i] == image[j]), data)


def test_prefix_lm_in_each_document():
    """Documents of 4 and 3 tokens, with prefixes of 2 and 3."""
    mask = df.Documents([0, 4, 7]) & df.ImageBlocks([0, 4], [2, 3])
    document, prefix = [0] * 4 + [1] * 3, {0, 1, 4, 5, 6}
    n = torch.arange(7)
    expected = dense(7, lambda i, j: document[i] == document[j] and (j <= i or j in prefix))
    assert torch.equal(mask.materialize(n, n), expected)


@st.composite
def trees(draw):
    segments = draw(st.integers(0, 9))
    parents = [draw(st.integers(-1, n - 1)) for n in range(segments)]
    return parents, draw(st.lists(st.integers(0, 3), min_size=segments, max_size=segments))


def ancestors(parents, segment):
    found = set()
    while parents[segment] >= 0:
        segment = parents[segment]
        found.add(segment)
    return found


@given(trees(), st.data())
@examples(200)
def test_trees(tree, data):
    parents, lengths = tree
    segment = [n for n, length in enumerate(lengths) for _ in range(length)]
    mask = df.Tree(parents, lengths)
    assert mask.seq_len == len(segment)
    check(
        mask,
        len(segment),
        lambda i, j: (segment[j] == segment[i] and j <= i) or segment[j] in ancestors(parents, segment[i]),
        data,
    )


@st.composite
def depth_first(draw):
    """Parents of a tree in depth-first order: each segment continues the last one or an ancestor of it."""
    parents = []
    for n in range(draw(st.integers(1, 12))):
        parents.append(draw(st.sampled_from(sorted({-1, n - 1} | (ancestors(parents, n - 1) if n else set())))))
    return parents


def breadth_first(parents):
    """The same tree with its segments in order of their depth."""
    order = sorted(range(len(parents)), key=lambda n: [*sorted(ancestors(parents, n)), n])
    order.sort(key=lambda n: len(ancestors(parents, n)))
    return [order.index(parents[n]) if parents[n] >= 0 else -1 for n in order]


@given(depth_first())
@examples(200)
def test_a_tree_in_order_has_no_more_parts_than_levels(parents):
    levels = 1 + max(len(ancestors(parents, n)) for n in range(len(parents)))
    for each in (parents, breadth_first(parents)):
        mask = df.Tree(each, [2] * len(each))
        assert len(mask.parts(torch.arange(mask.seq_len), mask.seq_len)) <= levels


@pytest.mark.parametrize(
    ("parents", "parts"),
    [([-1] + [0] * 64, 2), ([-1, 0, 1, 2, 3], 1), ([-1, -1, -1], 1), ([-1, 0, 0, 0, -1, 4, 4, 4], 2),
     ([-1, 0, 1, 1, 0, 4, 4], 3), ([], 1)],
    ids=["64 rollouts", "chain", "documents", "two prompts", "two turns", "nothing"],
)  # fmt: skip
def test_parts_of_common_trees(parents, parts):
    mask = df.Tree(parents, [3] * len(parents))
    assert len(mask.parts(torch.arange(mask.seq_len), mask.seq_len)) == parts


def test_a_tree_has_no_single_interval():
    with pytest.raises(TypeError, match=r"Tree\(.*\) gives a query several intervals of keys"):
        df.Tree([-1, 0, 0], [1, 1, 1]).ends(torch.arange(3), 3)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.int32)])
def test_integers_of_any_kind(kind):
    for mask, same in [
        (df.BlockCausal(kind([0, 2, 2, 5])), df.BlockCausal((0, 2, 5))),
        (df.ImageBlocks(kind([1, 3, 4]), kind([2, 0, 1])), df.ImageBlocks((1, 4), (2, 1))),
        (df.Tree(kind([-1, 0]), kind([2, 3])), df.Tree((-1, 0), (2, 3))),
    ]:
        assert mask == same and hash(mask) == hash(same) and repr(mask) == repr(same)
        assert pickle.loads(pickle.dumps(mask)) == same


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3)], ids=repr)
def test_numbers_of_any_kind(number):
    for mask, same in [(df.FirstTokens(number), df.FirstTokens(3)), (df.BlockCausal(number), df.BlockCausal(3))]:
        assert mask == same and hash(mask) == hash(same) and repr(mask) == repr(same)


@pytest.mark.parametrize("far", [2**62, 2**63, 2**70])
def test_numbers_beyond_every_position(far):
    n = torch.arange(5)
    for mask in (df.FirstTokens(far), df.BlockCausal(far)):
        assert mask.materialize(n, n).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: df.FirstTokens(-1), r"FirstTokens\(n\): expected an int of at least 0, got -1"),
        (lambda: df.FirstTokens(2.5), r"FirstTokens\(n\): expected an int"),
        (lambda: df.BlockCausal(0), r"BlockCausal\(size_or_boundaries\): expected an int of at least 1, got 0"),
        (lambda: df.BlockCausal(True), r"BlockCausal\(size_or_boundaries\): expected an int of at least 1 or"),
        (lambda: df.BlockCausal(2.5), r"BlockCausal\(size_or_boundaries\): expected an int of at least 1 or"),
        (lambda: df.BlockCausal("2"), r"BlockCausal\(size_or_boundaries\): expected an int of at least 1 or"),
        (lambda: df.BlockCausal([1, 3]), r"BlockCausal\(size_or_boundaries\): .*starting at 0"),
        (lambda: df.BlockCausal([0, 3, 2]), r"size_or_boundaries\[2\] = 2 follows size_or_boundaries\[1\] = 3"),
        (lambda: df.BlockCausal([0, 2**70]), r"BlockCausal\(size_or_boundaries\): expected at most"),
        (lambda: df.ImageBlocks([-1], [1]), r"ImageBlocks\(starts\): .*starts\[0\] = -1 is below 0"),
        (lambda: df.ImageBlocks([0, 2], [3, 1]), r"ImageBlocks\(starts\): .*starts\[1\] = 2 is below 3"),
        (lambda: df.ImageBlocks([4, 0], [1, 1]), r"ImageBlocks\(starts\): .*starts\[1\] = 0 is below 5"),
        (lambda: df.ImageBlocks([0], [-1]), r"ImageBlocks\(lengths\): .*lengths\[0\] = -1"),
        (lambda: df.ImageBlocks([0, 2], [1]), r"ImageBlocks\(lengths\): expected 2, as many as starts, got 1"),
        (lambda: df.ImageBlocks([0], [2**70]), r"ImageBlocks\(starts\): expected blocks that end by 2\*\*62"),
        (lambda: df.ImageBlocks(3, [1]), r"ImageBlocks\(starts\): .*the blocks' starts as a sequence"),
        (lambda: df.ImageBlocks([0.5], [1]), r"ImageBlocks\(starts\): expected whole numbers"),
        (lambda: df.Tree([0], [1]), r"Tree\(parents\): .*parents\[0\] = 0"),
        (lambda: df.Tree([-1, -2], [1, 1]), r"Tree\(parents\): .*parents\[1\] = -2"),
        (lambda: df.Tree([-1, 0], [1]), r"Tree\(lengths\): expected 2, as many as parents, got 1"),
        (lambda: df.Tree([-1], [-1]), r"Tree\(lengths\): expected at least 0 tokens, but lengths\[0\] = -1"),
        (lambda: df.Tree([-1], [2**70]), r"Tree\(lengths\): expected at most"),
        (lambda: df.Tree([-1], torch.zeros(1)), r"Tree\(lengths\): expected a one-dimensional integer tensor"),
    ],
)  # fmt: skip
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
