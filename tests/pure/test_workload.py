from bisect import bisect_left
from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.workload import Workload, first_reaching
from tests.strategies import documents, masks, patterns


def dense(mask, seq_len):
    positions = torch.arange(seq_len)
    return mask.materialize(positions, positions, seq_len)


@given(st.data(), st.integers(1, 40), st.integers(1, 9))
def test_pairs_of_causal_documents_are_exact(data, seq_len, chunk):
    mask = data.draw(documents(seq_len))
    mask = data.draw(st.sampled_from([mask, df.Causal() & mask]))
    work = Workload.of([mask], seq_len, chunk)
    expected = [0, *dense(mask, seq_len).sum(1).cumsum(0).tolist()]
    assert [work.before(position) for position in range(seq_len + 1)] == expected


@given(st.data(), st.integers(0, 40), st.integers(1, 9))
def test_nothing_is_seen_across_a_cut(data, seq_len, chunk):
    mask = data.draw(masks(seq_len) | patterns(seq_len)) & df.Causal()
    visible = dense(mask, seq_len)
    for cut in Workload.of([mask], seq_len, chunk).cuts[1:-1]:
        assert not visible[cut:, :cut].any() and not visible[:cut, cut:].any()


def test_cuts_are_the_documents_and_units_join_short_ones():
    work = Workload.of([df.Causal() & df.Documents([0, 2, 3, 12, 20])], 20, chunk=4)
    assert work.cuts == [0, 2, 3, 12, 20]
    assert work.units(chunk=4) == [(0, 12), (12, 20)] and work.units(chunk=1) == [(0, 2), (2, 3), (3, 12), (12, 20)]


def test_several_masks_add_up():
    """The rows of a batch: only what is a cut in all of them is one."""
    rows = [df.Documents([0, 3, 8]), df.Documents([0, 3, 5, 8])]
    work = Workload.of(rows, 8, chunk=100)
    assert work.before(8) == (9 + 25) + (9 + 4 + 9) and work.cuts == [0, 3, 8]


def test_only_ends_of_segments_are_looked_at():
    """A bound on the work: a million tokens in thousands of documents cost as many queries as there are of these."""
    asked = []

    class Counting(df.Mask):
        def ends(self, positions, seq_len):
            asked.append(len(positions))
            return df.Causal().ends(positions, seq_len)

        def jumps(self, seq_len):
            return torch.arange(0, seq_len, 1000)

    Workload.of([Counting()], 2**20, 512)
    assert sum(asked) <= 2 * (2**20 // 512 + 2**20 // 1000 + 2)


@given(st.data(), st.integers(1, 40))
def test_moved_counts_the_keys_of_others(data, seq_len):
    """With segments of one token there are no estimates. Every query sees itself here, and masks leave no gaps."""
    mask = df.Causal() & data.draw(documents(seq_len))
    a, b, c = sorted(data.draw(st.tuples(*[st.integers(0, seq_len)] * 3)))
    held = [piece for piece in ((0, a), (b, c)) if piece[0] < piece[1]]
    own = torch.zeros(seq_len, dtype=torch.bool)
    for start, stop in held:
        own[start:stop] = True
    expected = int((dense(mask, seq_len)[own].any(0) & ~own).sum())
    assert Workload.of([mask], seq_len, 1).moved(held) == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 60))
def test_interpolation_finds_what_bisection_does(steps, goal):
    counts = list(accumulate(steps))
    assert first_reaching(goal, 0, len(counts), counts.__getitem__) == bisect_left(counts, goal)
