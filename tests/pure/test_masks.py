import copy
import operator
import pickle
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.exact import exact
from distflash.mask_algebra import And
from tests.oracle import Blind
from tests.strategies import masks


def sees(mask, i, j, seq_len):
    """Whether query ``i`` sees key ``j``, pair by pair, as one would say it in words."""
    match mask:
        case df.Full():
            return True
        case df.Causal():
            return j <= i
        case df.Window(left, right):
            return i - left <= j <= i + right
        case df.Documents(cu_seqlens=ends):
            return not any(min(i, j) < end <= max(i, j) for end in ends)
        case df.PrefixLM(length):
            return j < length or j <= i
        case df.Chunked(size):
            return i // size == j // size
        case Blind(start, stop):
            before = i < start and j <= i
            after = i >= stop and stop <= j <= i
            return before or after
        case _:
            combine = all if isinstance(mask, And) else any
            return combine([sees(mask.first, i, j, seq_len), sees(mask.second, i, j, seq_len)])


@dataclass(frozen=True)
class _First(df.Mask):
    """All queries see the first keys."""

    count: int

    def ends(self, positions, seq_len):
        return torch.zeros_like(positions), torch.full_like(positions, self.count)


lengths_and_masks = st.integers(1, 24).flatmap(lambda n: st.tuples(st.just(n), masks(n)))


@given(lengths_and_masks)
def test_materialize_is_the_definition_pair_by_pair(drawn):
    seq_len, mask = drawn
    positions = torch.arange(seq_len)
    expected = [[sees(mask, i, j, seq_len) for j in range(seq_len)] for i in range(seq_len)]
    assert mask.materialize(positions, positions).tolist() == expected


@given(lengths_and_masks, st.randoms(use_true_random=False))
def test_materialize_takes_positions_in_any_order(drawn, random):
    seq_len, mask = drawn
    q, k = (torch.tensor(random.choices(range(seq_len), k=5)) for _ in range(2))
    whole = mask.materialize(torch.arange(seq_len), torch.arange(seq_len))
    assert torch.equal(mask.materialize(q, k, seq_len), whole[q][:, k])


@given(lengths_and_masks, st.data())
def test_parts_are_disjoint_and_never_decrease(drawn, data):
    seq_len, mask = drawn
    positions = torch.tensor(sorted(data.draw(st.sets(st.integers(0, seq_len - 1)))), dtype=torch.int64)
    keys = torch.arange(seq_len)
    counts = torch.zeros(len(positions), seq_len, dtype=torch.int64)
    for lo, hi in mask.parts(positions, seq_len):
        for end in (lo, hi):
            assert end.dtype == torch.int64 and end.shape == positions.shape
            assert (end.diff() >= 0).all()
        counts += (keys >= lo[:, None]) & (keys < hi[:, None])
    assert torch.equal(counts, mask.materialize(positions, keys, seq_len).long())


@pytest.mark.parametrize(
    "mask, expected",
    [
        (df.Full(), 1),
        (df.Causal() | df.PrefixLM(9), 1),
        (df.Causal() | df.Window(3, 2), 1),
        (df.Window(4, 0) | df.Window(0, 4), 1),
        (df.Documents([0, 8, 30]) | df.Causal(), 1),
        (df.Window(4, 0) | (df.Causal() & df.Chunked(5)), 1),
        (df.Causal() & (df.Window(4, 0) | _First(2)), 2),
        (df.Window(0, 0) | _First(0), 1),
    ],
)
def test_parts_that_touch_are_one(mask, expected):
    assert len(mask.parts(torch.arange(30), 30)) == expected


def test_a_mask_of_several_intervals_has_no_ends():
    with pytest.raises(TypeError, match=r"several intervals of keys; use parts\(positions, seq_len\)"):
        (df.Causal() | df.Full()).ends(torch.arange(3), 3)


@given(lengths_and_masks)
def test_copies_are_equal(drawn):
    _, mask = drawn
    for again in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert again == mask and hash(again) == hash(mask) and repr(again) == repr(mask)


def test_different_masks_differ():
    different = [
        df.Full(),
        df.Causal(),
        df.Window(3, 0),
        df.Window(3, 1),
        df.Documents([0, 3, 8]),
        df.Documents([0, 4, 8]),
        df.PrefixLM(3),
        df.Chunked(3),
        df.Causal() & df.Window(3),
        df.Window(3) & df.Causal(),
        df.Window(3) | df.Causal(),
    ]
    assert len(set(different)) == len(set(map(exact, different))) == len(different)


@pytest.mark.parametrize("cu_seqlens", [(0, 3, 8), [0, 3, 8], range(0, 9, 4), torch.tensor([0, 3, 8]),
                                        torch.tensor([0, 3, 8], dtype=torch.int32), [0, 3.0, 8], np.array([0, 3, 8]),
                                        np.array([0, 3, 8], dtype=np.int32), list(np.array([0, 3, 8])),
                                        [0, torch.tensor(3), 8], torch.tensor([0, 3, 8]).numpy()])  # fmt: skip
def test_documents_take_ints_in_any_form(cu_seqlens):
    mask = df.Documents(cu_seqlens)
    assert mask.cu_seqlens == tuple(int(v) for v in cu_seqlens) and all(type(v) is int for v in mask.cu_seqlens)
    assert mask.seq_len == (df.Causal() & mask).seq_len == 8


@pytest.mark.parametrize(
    "cu_seqlens", [[0, 3, 3, 8], [0, 0, 3, 8], [0, 3, 8, 8, 8], torch.tensor([0, 3, 8, 8])], ids=str
)
def test_empty_documents_and_padding_are_left_out(cu_seqlens):
    mask = df.Documents(cu_seqlens)
    assert mask == df.Documents([0, 3, 8]) and hash(mask) == hash(df.Documents([0, 3, 8]))


def test_documents_of_no_token():
    assert df.Documents([0, 0, 0]) == df.Documents([0, 0])
    assert df.Documents([0, 0]).seq_len == 0


@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        ([1, 3], "starting at 0"),
        ([-1, 3], "starting at 0"),
        ([0], r"at least \[0, S\]"),
        ([], r"at least \[0, S\]"),
        ([0, 5, 3], "must not decrease"),
        ([0, 3, 8, 0, 0], "must not decrease.*pad by repeating the last"),
        ([0, 2.5, 4], "whole numbers"),
        ([0, float("nan")], "whole numbers"),
        ([0, float("inf")], "whole numbers"),
        ([0, None], "whole numbers"),
        ([[0, 3], [3, 8]], "whole numbers"),
        (np.array([[0, 3], [3, 8]]), "whole numbers"),
        ([False, True], "whole numbers"),
        ("0, 3, 8", "cumulative lengths as a sequence"),
        (8, "cumulative lengths as a sequence"),
        ([0, 2**70], "at most"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), "meta"),
        (torch.tensor([[0, 3]]), "one-dimensional integer"),
        (torch.tensor([0.0, 3.0]), "one-dimensional integer"),
        (torch.tensor([False, True]), "one-dimensional integer"),
    ],
    ids=str,
)
def test_documents_refuse(cu_seqlens, words):
    with pytest.raises(ValueError, match=rf"Documents\(cu_seqlens\): .*{words}"):
        df.Documents(cu_seqlens)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: df.Window(-1), r"Window\(left\)"),
        (lambda: df.Window(3, -1), r"Window\(right\)"),
        (lambda: df.Window(2.0), r"Window\(left\)"),
        (lambda: df.Window("3"), r"Window\(left\)"),
        (lambda: df.Window(float("inf")), r"Window\(left\)"),
        (lambda: df.Window(torch.tensor([1, 2])), r"Window\(left\)"),
        (lambda: df.Window(np.True_), r"Window\(left\)"),
        (lambda: df.Chunked(np.int64(0)), r"Chunked\(size\)"),
        (lambda: df.PrefixLM(-1), r"PrefixLM\(length\)"),
        (lambda: df.PrefixLM(True), r"PrefixLM\(length\)"),
        (lambda: df.Chunked(0), r"Chunked\(size\)"),
    ],
)
def test_numbers_are_checked(make, name):
    with pytest.raises(ValueError, match=f"{name}: expected an int of at least"):
        make()


def test_a_negative_window_is_told_how_to_write_no_limit():
    for arguments in ((-1,), (-1, -1), (3, -1)):
        with pytest.raises(ValueError, match=r"got -1; for no limit write sys\.maxsize"):
            df.Window(*arguments)


@pytest.mark.parametrize(
    "number", [np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)], ids=repr
)
def test_numbers_may_be_integers_of_any_kind(number):
    for mask, same in [
        (df.Window(number, number), df.Window(3, 3)),
        (df.PrefixLM(number), df.PrefixLM(3)),
        (df.Chunked(number), df.Chunked(3)),
    ]:
        assert mask == same and repr(mask) == repr(same) and hash(mask) == hash(same)


@pytest.mark.parametrize("far", [2**62 - 1, 2**62, 2**62 + 1, sys.maxsize - 1, sys.maxsize, 2**63, 2**64 - 1, 2**70])
def test_numbers_beyond_every_position_are_no_limit(far):
    """Neither do ends wrap around at int64's limits, nor do larger ints of Python's raise."""
    n = torch.arange(9)
    for mask, same in [
        (df.Window(far), df.Causal()),
        (df.Window(far, far), df.Full()),
        (df.Window(0, far), df.Window(0, 9)),
        (df.PrefixLM(far), df.Full()),
        (df.Chunked(far), df.Full()),
        (df.Causal() & df.Window(far, 2), df.Causal()),
    ]:
        for positions in (n, n + 2**40):
            assert torch.equal(mask.materialize(positions, positions), same.materialize(positions, positions))


def test_masks_have_no_truth_value():
    """`a and b` would be b alone, and `a or b` a alone."""
    for combine in (lambda a, b: a and b, lambda a, b: a or b):
        with pytest.raises(
            ValueError, match=r"mask: Causal\(\) has no truth value; combine masks with `a & b` or `a \| b`"
        ):
            combine(df.Causal(), df.Window(3))


@pytest.mark.parametrize("combine, sign", [(operator.and_, "&"), (operator.or_, "|")])
def test_combinations_take_masks_only_and_one_length(combine, sign):
    with pytest.raises(TypeError):
        combine(df.Causal(), "window")
    with pytest.raises(ValueError, match=rf"sides of \{sign} are for different lengths, 8 and 9"):
        combine(df.Documents([0, 8]), df.Documents([0, 9]))
    assert (df.Documents([0, 8]) & df.Causal() & df.Documents([0, 3, 8])).seq_len == 8
