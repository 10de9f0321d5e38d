"""Pictures of masks show each pair once, in the colour of the rank that holds its query."""

import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash import pictures
from distflash.geometry import Geometry, Needs
from tests.strategies import layouts, masks, patterns

EXAMPLE = df.Causal() & (df.Window(3) | df.FirstTokens(2))


def dense_cells(mask, seq_len, queries, edges):
    """Pairs by cells, from the dense mask."""
    n = torch.arange(seq_len)
    allowed = mask.materialize(n, n, seq_len) & torch.isin(n, queries)[:, None]
    cell = torch.searchsorted(edges, n, right=True) - 1
    at = cell[:, None] * (len(edges) - 1) + cell
    return torch.bincount(at[allowed], minlength=(len(edges) - 1) ** 2).view(len(edges) - 1, len(edges) - 1)


@given(st.integers(1, 40), layouts, st.integers(1, 5), st.data())
def test_pairs_of_cells_are_those_of_the_dense_mask(seq_len, layout, world_size, data):
    mask = data.draw(masks(seq_len) | patterns(seq_len))
    inner = data.draw(st.sets(st.integers(1, seq_len - 1))) if seq_len > 1 else set()
    edges = torch.tensor([0, *sorted(inner), seq_len])
    shares = []
    for rank in range(world_size):
        queries = layout.positions(seq_len, world_size, rank)
        counts = pictures.count_pairs(mask, seq_len, queries, edges)
        assert counts.dtype == torch.int64 and torch.equal(counts, dense_cells(mask, seq_len, queries, edges))
        shares.append(int(counts.sum()))
    assert shares == Needs.of(Geometry.of_sequence(mask, layout, seq_len, world_size)).pairs.sum(1).tolist()


def test_a_million_tokens_are_counted_exactly():
    S = 2**20 + 1
    edges = pictures._edges(S)
    assert len(edges) == pictures.CELLS + 1 and edges[-1] == S
    counts = pictures.count_pairs(df.Causal(), S, torch.arange(S), edges)
    starts, sizes = edges[:-1], edges.diff()
    assert torch.equal(counts.sum(1), sizes * starts + sizes * (sizes + 1) // 2)
    assert counts.sum() == S * (S + 1) // 2 and not counts.triu(1).any()


@dataclass(frozen=True)
class Backwards(df.Mask):
    """Breaks the promise: its ends decrease. A picture shows what it gave."""

    def ends(self, positions, seq_len):
        return torch.zeros_like(positions), seq_len - positions


def test_a_mask_that_no_call_would_take_is_shown_as_it_is():
    counts = pictures.count_pairs(Backwards(), 5, torch.arange(5), torch.arange(6))
    assert torch.equal(counts, torch.ones(5, 5, dtype=torch.int64).triu().flip(1))


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_every_pixel_of_a_short_sequence(plt):
    S, W, layout = 24, 4, df.Zigzag()
    ax = EXAMPLE.plot(S, layout, W)
    n, owner = torch.arange(S), torch.empty(S, dtype=torch.int64)
    for rank in range(W):
        owner[layout.positions(S, W, rank)] = rank
    colors = torch.stack([pictures._as_rgb(color) for color in pictures.COLORS[:W]])
    background = pictures._as_rgb(pictures.BACKGROUND)
    expected = torch.where(EXAMPLE.materialize(n, n, S)[..., None], colors[owner][:, None], background)
    picture, queries, keys = (torch.tensor(image.get_array()) for image in ax.images)
    assert torch.equal(picture, expected)
    assert torch.equal(queries[:, 0], colors[owner]) and torch.equal(keys[0], colors[owner])
    pairs = Needs.of(Geometry.of_sequence(EXAMPLE, layout, S, W)).pairs.sum(1)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        f"rank {rank}: {share:.1%}" for rank, share in enumerate((pairs / pairs.sum()).tolist())
    ]
    title = ax.get_title(loc="left")
    assert title == "And(first=Causal(), second=Or(first=Window(left=3, right=0), ... stTokens(n=2)))"
    assert ax.get_xlabel() == f"key position\n{pairs.sum()} pairs, {int(pairs.sum()) / S**2:.2%} of all"


def test_one_rank_needs_no_layout_and_axes_may_be_given(plt):
    _, ax = plt.subplots()
    mask = df.Tree([-1, 0, 0], [4, 3, 2])
    assert mask.plot(ax=ax) is ax
    n, (picture,) = torch.arange(9), ax.images
    shown = (torch.tensor(picture.get_array()) == pictures._as_rgb(pictures.COLORS[0])).all(-1)
    assert torch.equal(shown, mask.materialize(n, n)) and ax.get_legend() is None
    assert len(plt.get_fignums()) == 1


def test_cells_of_a_long_sequence_are_as_dark_as_their_fractions(plt):
    S = 4 * pictures.CELLS
    ax = (df.Causal() & (df.Window(0) | df.FirstTokens(1))).plot(S)
    picture = torch.tensor(ax.images[0].get_array())
    assert picture.shape == (pictures.CELLS, pictures.CELLS, 3)
    color, background = (pictures._as_rgb(c) for c in (pictures.COLORS[0], pictures.BACKGROUND))
    darkness = ((picture - background) / (color - background)).mean(-1)
    pale = pictures._PALEST
    # Of 16 pairs of a cell: 7 in the first one, 4 in the first column and on the diagonal.
    expected = torch.zeros(pictures.CELLS, pictures.CELLS, dtype=torch.float64)
    expected[:, 0] = pale + (1 - pale) * 4 / 16
    expected.fill_diagonal_(pale + (1 - pale) * 4 / 16)
    expected[0, 0] = pale + (1 - pale) * 7 / 16
    torch.testing.assert_close(darkness, expected)


def test_more_ranks_than_colours_and_ranks_without_tokens(plt):
    ax = df.Causal().plot(7, df.Striped(), 40)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[0] == "rank 0: 3.6%" and labels[6:8] == ["rank 6: 25.0%", "rank 7: 0.0%"] and len(labels) == 40
    ax = df.FirstTokens(0).plot(5, df.Zigzag(), 2)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rank 0: 0.0%", "rank 1: 0.0%"]


def test_a_machine_without_matplotlib_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python marks what cannot be imported
    with pytest.raises(ImportError, match=r'matplotlib is not installed; pip install "distflash\[plot\]"'):
        df.Causal().plot(4)


class Lossy(df.Contiguous):
    def ranges(self, seq_len, world_size, rank):
        return (range(1, seq_len),)


@pytest.mark.parametrize(
    ("mask", "arguments", "words"),
    [
        (df.Causal(), {}, r"seq_len: Causal\(\) is for any length; pass the length to draw"),
        (df.Causal(), {"seq_len": 0}, "seq_len: expected an int of at least 1, got 0"),
        (df.Causal(), {"seq_len": 2.5}, "seq_len: expected an int of at least 1, got 2.5"),
        (df.Documents([0, 4]), {"seq_len": 5}, "seq_len: got 5, but the mask is for 4 tokens"),
        (df.Tree([], []), {}, "seq_len: expected an int of at least 1, got 0"),
        (df.Causal(), {"seq_len": 4, "world_size": 0}, "world_size: expected an int of at least 1, got 0"),
        (df.Causal(), {"seq_len": 4, "world_size": 2}, "layout: 2 ranks need one"),
        (df.Causal(), {"seq_len": 4, "layout": df.Zigzag}, "layout: expected a Layout such as"),
        (df.Causal(), {"seq_len": 4, "layout": "zigzag", "world_size": 2}, "layout: expected a Layout such as"),
        (df.Causal(), {"seq_len": 4, "layout": Lossy()}, "layout: .* does not give each of 4 positions"),
    ],
)
def test_refusals(mask, arguments, words):
    with pytest.raises(ValueError, match=words):
        mask.plot(**arguments)
