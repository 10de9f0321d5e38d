import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.intervals import Sharding, build, count_pairs
from tests.strategies import layouts, masks


@st.composite
def shardings(draw, max_world=8):
    seq_len = draw(st.integers(0, 40))
    return Sharding(draw(masks(seq_len)), draw(layouts), seq_len, draw(st.integers(1, max_world)))


def visible(sharding, rank, owner):
    return sharding.mask.materialize(sharding.positions(rank), sharding.positions(owner), sharding.seq_len)


def as_dense(lo, hi, n):
    indices = torch.arange(n)
    return (indices >= lo[:, None]) & (indices < hi[:, None])


@given(shardings(), st.data())
def test_rows_and_columns_are_the_mask(sharding, data):
    rank, owner = (data.draw(st.integers(0, sharding.world_size - 1)) for _ in range(2))
    got, expected = build(sharding, rank, owner), visible(sharding, rank, owner)
    T, K = expected.shape
    assert torch.equal(as_dense(got.row_lo, got.row_hi, K), expected)
    assert torch.equal(as_dense(got.col_lo, got.col_hi, T), expected.T)
    assert got.pairs == expected.sum()
    assert torch.equal(got.q_positions, sharding.positions(rank).int())
    assert torch.equal(got.k_positions, sharding.positions(owner).int())


@given(shardings(), st.data())
def test_ends_are_int32_within_bounds_and_never_move_backwards(sharding, data):
    rank, owner = (data.draw(st.integers(0, sharding.world_size - 1)) for _ in range(2))
    got = build(sharding, rank, owner)
    T, K = sharding.length(rank), sharding.length(owner)
    for lo, hi, size, bound in ((got.row_lo, got.row_hi, T, K), (got.col_lo, got.col_hi, K, T)):
        assert lo.dtype == hi.dtype == torch.int32 and lo.shape == hi.shape == (size,)
        assert (lo >= 0).all() and (lo <= hi).all() and (hi <= bound).all()
        assert (lo.diff() >= 0).all() and (hi.diff() >= 0).all()


@given(shardings(), st.data())
def test_keys_that_no_query_sees_are_known(sharding, data):
    rank, owner = (data.draw(st.integers(0, sharding.world_size - 1)) for _ in range(2))
    got = build(sharding, rank, owner)
    unseen = (~visible(sharding, rank, owner).any(0)).nonzero().flatten().tolist()
    listed = [key for keys in got.unseen for key in keys]
    assert len(got.unseen) <= 2
    assert set(unseen) <= set(listed)
    if listed != unseen:  # more than two ranges: all from the first to the last
        assert got.unseen == (range(unseen[0], unseen[-1] + 1),)


@given(shardings())
def test_count_pairs_counts(sharding):
    ranks = range(sharding.world_size)
    expected = [[int(visible(sharding, rank, owner).sum()) for owner in ranks] for rank in ranks]
    assert count_pairs(sharding).tolist() == expected


def test_pairs_beyond_32_bits():
    pairs = count_pairs(Sharding(df.Causal(), df.Zigzag(), 2**18, 2))
    assert pairs.sum() == 2**18 * (2**18 + 1) // 2
    assert build(Sharding(df.Full(), df.Contiguous(), 2**17, 1), 0, 0).pairs == 2**34
