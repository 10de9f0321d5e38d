"""Which rank stores new tokens: the vectorised result against a loop over tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from distflash.cache_balance import rebalance, storing_ranks

counts = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(counts, st.integers(0, 20))
def test_each_token_goes_to_the_first_rank_that_has_fewest(kept, new):
    expected, now = [], list(kept)
    for _ in range(new):
        expected.append(now.index(min(now)))
        now[expected[-1]] += 1
    assert storing_ranks(torch.tensor([kept, kept]), new).tolist() == [expected, expected]


@given(st.data(), counts)
def test_no_rank_has_more_than_its_share_and_as_few_as_possible_move(data, kept):
    new = data.draw(st.lists(st.integers(0, 9), min_size=len(kept), max_size=len(kept)))
    gives = rebalance(kept, new)
    share = -(-(sum(kept) + sum(new)) // len(kept))
    assert sum(gives) == 0 and all(n <= have for n, have in zip(gives, new, strict=True))
    after = [k + n - given for k, n, given in zip(kept, new, gives, strict=True)]
    assert all(a <= max(share, k) for a, k in zip(after, kept, strict=True))
    # Whoever gives would have more than the share, or gives all.
    for n, given_away, have in zip(after, gives, new, strict=True):
        assert given_away <= 0 or n == share or given_away == have


def test_chunks_of_one_token_do_not_all_land_on_one_rank():
    kept = [0, 0, 0, 0]
    for _ in range(7):
        gives = rebalance(kept, [1, 0, 0, 0])
        kept = [k + n - g for k, n, g in zip(kept, [1, 0, 0, 0], gives, strict=True)]
    assert sorted(kept) == [1, 2, 2, 2]
