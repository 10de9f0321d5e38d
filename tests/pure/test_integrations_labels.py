"""Labels before they are sharded: shifts by any number, within documents; which labels are shifted; digests."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.integrations.labels import IGNORED, are_shifted, are_tokens, digest, shift


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(sum), by=st.integers(0, 12))
def test_a_shift_is_that_of_each_document_by_itself(lengths, by):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.arange(2 * int(ends[-1])).view(2, -1)
    parts = [shift(part, by) for part in x.split(lengths, 1)]
    assert torch.equal(shift(x, by, df.Documents(ends)), torch.cat(parts, 1))


@given(length=st.integers(1, 6), by=st.integers(0, 9))
def test_a_shift_moves_what_there_is_and_fills_the_rest(length, by):
    row = list(range(1, length + 1))
    assert shift(torch.tensor([row]), by, fill=-7).tolist() == [row[by:] + [-7] * min(by, length)]


def test_labels_are_told_apart_by_what_counts():
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    following = shift(tokens)
    some = following.masked_fill(tokens == 4, IGNORED)
    assert are_shifted(following, tokens) and are_shifted(some, tokens) and not are_tokens(some, tokens)
    own = tokens.masked_fill(tokens == 4, IGNORED)
    assert are_tokens(tokens, tokens) and are_tokens(own, tokens) and not are_shifted(own, tokens)
    assert are_tokens(tokens.masked_fill(tokens == 4, 9), tokens, ignored=9)
    same = torch.ones_like(tokens)
    for labels, of in [(torch.full_like(tokens, IGNORED), tokens), (same, same), (tokens + 1, tokens)]:
        assert not are_tokens(labels, of) and not are_shifted(labels, of)


@pytest.mark.parametrize(
    "other",
    [(torch.arange(7),), (torch.arange(6).int(),), (torch.arange(6).view(2, 3),), (torch.arange(6), torch.arange(0))],
    ids=["length", "type", "shape", "one more"],
)
def test_digests_differ_where_tensors_do(other):
    assert digest(torch.arange(6)) == digest(torch.arange(12)[::2] // 2) != digest(*other)
