from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.geometry import Geometry, Needs
from distflash.intervals import build
from tests.strategies import layouts, masks


@st.composite
def geometries(draw, max_world=8):
    seq_len = draw(st.integers(0, 40))
    return Geometry.of_sequence(draw(masks(seq_len)), draw(layouts), seq_len, draw(st.integers(1, max_world)))


def visible(geometry, rank, owner):
    return geometry.mask.materialize(geometry.queries.positions(rank), geometry.keys.positions(owner), geometry.seq_len)


def as_dense(lo, hi, n):
    indices = torch.arange(n)
    return (indices >= lo[:, None]) & (indices < hi[:, None])


@st.composite
def builds(draw):
    """A geometry with the intervals between two of its ranks."""
    geometry = draw(geometries())
    rank, owner = (draw(st.integers(0, geometry.world_size - 1)) for _ in range(2))
    return geometry, rank, owner, build(geometry, rank, owner)


def on_all_keys(part, dense, keys):
    """``dense [len(part.keys), n]`` with a row for each of the owner's keys."""
    whole = torch.zeros(keys, dense.shape[1], dtype=dense.dtype)
    whole[part.keys.start : part.keys.stop] = dense
    return whole


@given(builds())
def test_rows_and_columns_are_the_mask(built):
    geometry, rank, owner, parts = built
    expected = visible(geometry, rank, owner).int()
    T, K = expected.shape
    rows = [on_all_keys(p, as_dense(p.row_lo, p.row_hi, len(p.keys)).int().T, K).T for p in parts]
    columns = [on_all_keys(p, as_dense(p.col_lo, p.col_hi, T).int(), K) for p in parts]
    # Sums, so that a pair that two parts allow would be 2.
    assert torch.equal(sum(rows), expected)
    assert torch.equal(sum(columns), expected.T)
    assert sum(p.pairs for p in parts) == expected.sum()
    assert parts[0].keys == range(K)
    for part in parts:
        assert torch.equal(part.q_positions, geometry.queries.positions(rank).int())
        assert torch.equal(part.k_positions, geometry.keys.positions(owner)[part.keys.start : part.keys.stop].int())


@given(builds())
def test_ends_are_int32_within_bounds_and_never_decrease(built):
    geometry, rank, _, parts = built
    T = geometry.queries.length(rank)
    for got in parts:
        K = len(got.keys)
        for lo, hi, size, bound in ((got.row_lo, got.row_hi, T, K), (got.col_lo, got.col_hi, K, T)):
            assert lo.dtype == hi.dtype == torch.int32 and lo.shape == hi.shape == (size,)
            assert (lo >= 0).all() and (lo <= hi).all() and (hi <= bound).all()
            assert (lo.diff() >= 0).all() and (hi.diff() >= 0).all()


@given(builds())
def test_keys_that_no_query_sees_are_known(built):
    for got in built[3]:
        seen = as_dense(got.row_lo, got.row_hi, len(got.keys)).any(0)
        unseen = (~seen).nonzero().flatten().tolist()
        listed = [key for keys in got.unseen for key in keys]
        assert len(got.unseen) <= 2
        assert set(unseen) <= set(listed)
        if listed != unseen:  # more than two ranges: all from the first to the last
            assert got.unseen == (range(unseen[0], unseen[-1] + 1),)


@given(builds())
def test_parts_after_the_first_are_about_no_more_keys_than_they_allow(built):
    for part in built[3][1:]:
        assert part.pairs > 0
        assert part.col_lo[0] < part.col_hi[0] and part.col_lo[-1] < part.col_hi[-1]


def test_a_union_of_too_many_intervals_is_refused_with_their_number():
    mask = _Keys(tuple(range(0, 80, 2)))
    with pytest.raises(ValueError, match=r"40 intervals of keys that cannot be joined; expected at most 16"):
        Needs.of(Geometry.of_sequence(mask, df.Contiguous(), 80, 2))


@dataclass(frozen=True)
class _Keys(df.Mask):
    """All queries see these keys, each an interval of its own."""

    keys: tuple[int, ...]

    def parts(self, positions, seq_len):
        return tuple((torch.full_like(positions, key), torch.full_like(positions, key + 1)) for key in self.keys)


@given(geometries())
def test_pairs_are_counted(geometry):
    ranks = range(geometry.world_size)
    expected = [[int(visible(geometry, rank, owner).sum()) for owner in ranks] for rank in ranks]
    assert Needs.of(geometry).pairs.tolist() == expected


def test_pairs_beyond_32_bits():
    pairs = Needs.of(Geometry.of_sequence(df.Causal(), df.Zigzag(), 2**18, 2)).pairs
    assert pairs.sum() == 2**18 * (2**18 + 1) // 2
    assert build(Geometry.of_sequence(df.Full(), df.Contiguous(), 2**17, 1), 0, 0)[0].pairs == 2**34


@dataclass(frozen=True)
class Lookahead(df.Mask):
    """A user's own mask, whose ends wrap around at int64's limits for large n."""

    n: int

    def ends(self, positions, seq_len):
        return torch.zeros_like(positions), positions + 1 + self.n


@dataclass(frozen=True)
class Ends(df.Mask):
    """Of these numbers, whatever they are."""

    lo: tuple
    hi: tuple
    dtype: torch.dtype = torch.int64

    def ends(self, positions, seq_len):
        return tuple(torch.tensor(end, dtype=self.dtype) for end in (self.lo, self.hi))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            Lookahead(2**63 - 1),
            r"mask: Lookahead\(n=9223372036854775807\).ends .*wrapped around at int64's limits; clamp",
        ),
        (Ends((0, 0, 0), (1, 3, 2)), "hi = 3 for the query at 1 and 2 for that at 2; expected numbers that never"),
        (Ends((0, 2, 1), (3, 3, 3)), "lo = 2 for the query at 1 and 1 for that at 2; expected numbers that never"),
        (Ends((0, 0), (3, 3)), r"lo as torch.int64 \[2\]; expected int64 \[3\], one number per query"),
        (Ends((0, 0, 0), (3, 3, 3), torch.int32), r"lo as torch.int32 \[3\]; expected int64 \[3\]"),
    ],
    ids=repr,
)
def test_a_mask_that_breaks_its_promises_is_refused(mask, words):
    for work in (Needs.of, lambda s: build(s, 0, 0)):
        with pytest.raises(ValueError, match=words):
            work(Geometry.of_sequence(mask, df.Contiguous(), 3, 1))


def test_ends_far_outside_are_clamped():
    assert Needs.of(Geometry.of_sequence(Lookahead(2**62), df.Contiguous(), 3, 1)).pairs.tolist() == [[9]]
    assert Needs.of(
        Geometry.of_sequence(Ends((-(2**63),) * 3, (2**63 - 1,) * 3), df.Contiguous(), 3, 1)
    ).pairs.tolist() == [[9]]


@dataclass(frozen=True)
class Ranges(df.Layout):
    """Of these ranges by rank, whatever they are."""

    of_ranks: tuple

    def ranges(self, seq_len, world_size, rank):
        return self.of_ranks[rank]


@pytest.mark.parametrize(
    "of_ranks",
    [
        ((range(0, 3),), (range(4, 6),)),
        ((range(0, 3),), (range(2, 5),)),
        ((range(4, 6), range(0, 2)), (range(2, 4),)),
        ((range(2, -1, -1),), (range(3, 6),)),
        ((range(0, 3), range(2, 3)), (range(4, 6),)),
    ],
    ids=["a position is missing", "a position is held twice", "not in order", "descending", "overlapping"],
)
def test_a_layout_that_breaks_its_promises_is_refused(of_ranks):
    with pytest.raises(
        ValueError, match=r"layout: Ranges\(.*expected ascending ranges that hold each of the 6 positions"
    ):
        Needs.of(Geometry.of_sequence(df.Full(), Ranges(of_ranks), 6, 2))


@pytest.mark.parametrize(
    "combine",
    [
        lambda mask: mask & df.Causal(),
        lambda mask: mask | df.Window(0, 0),
        lambda mask: df.Window(0, 0) | mask,
        lambda mask: df.Causal() & (df.Window(0, 0) | mask),
        lambda mask: (mask & df.Full()) | df.Window(0, 0),
    ],
)
def test_ends_that_have_wrapped_around_are_refused_inside_others_too(combine):
    with pytest.raises(ValueError, match="wrapped around"):
        Needs.of(Geometry.of_sequence(combine(Lookahead(2**63 - 1)), df.Contiguous(), 3, 1))
