from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.geometry import Geometry
from distflash.visible import Runs, joined, seen

RANKS, TOKENS = 3, 30


def bounds(draw, queries):
    """Bounds that do not decrease, some of them of empty intervals."""
    numbers = st.lists(st.integers(0, 40), min_size=queries, max_size=queries)
    return tuple(torch.tensor(sorted(draw(numbers)), dtype=torch.int64) for _ in range(2))


def dense(lo, hi, positions):
    return (positions >= lo[:, None]) & (positions < hi[:, None])


# Up to 60 queries: more and fewer than there are ends of runs.
@given(st.data(), st.integers(0, 60), st.lists(st.integers(0, RANKS), min_size=TOKENS, max_size=TOKENS))
def test_pairs_are_those_of_the_dense_mask(data, queries, owners):
    """Keys of `RANKS` are nobody's: caches drop keys."""
    parts = [bounds(data.draw, queries) for _ in range(data.draw(st.integers(1, 2)))]
    held = [torch.tensor([at for at, owner in enumerate(owners) if owner == rank]).long() for rank in range(RANKS)]
    expected = [sum(int(dense(*ends, positions).sum()) for ends in parts) for positions in held]
    assert Runs.of(held).pairs(parts).tolist() == expected


@given(st.data(), st.integers(0, 12))
def test_seen_positions_are_those_of_the_dense_mask(data, queries):
    parts = [bounds(data.draw, queries) for _ in range(2)]
    found, positions = seen(parts), torch.arange(41)
    expected = torch.stack([dense(*ends, positions).any(0) for ends in parts]).any(0)
    assert [at for run in found for at in run] == expected.nonzero().flatten().tolist()
    assert all(a.stop < b.start for a, b in pairwise(found))


def test_neighbours_are_joined_unless_another_sees_them():
    lo, hi, whose = map(torch.tensor, ([0, 2, 5, 6, 7], [2, 4, 5, 7, 9], [0, 0, 0, 0, 1]))
    assert joined(lo, hi, whose) == ([0, 6, 7], [4, 7, 9], [0, 0, 1])


def test_needs_look_at_few_positions_of_each_source():
    """A bound on the work: each of many ranks looks up the ends of ranges, not the bounds of all queries."""
    asked = []

    class Counting(df.Zigzag):
        def count_below(self, positions, seq_len, world_size, rank):
            asked.append(len(positions))
            return super().count_below(positions, seq_len, world_size, rank)

    mask = df.Causal() & df.Documents(range(0, 8193, 512))
    Geometry.of_sequence(mask, Counting(), 8192, 8).needs.pairs.sum()
    assert sum(asked) <= 8 * 2 * (16 + 8 * 4)
