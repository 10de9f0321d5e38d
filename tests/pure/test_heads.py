"""Pooling of key heads against its definition, head by head."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import distflash as df
from distflash.heads import heads_problem
from tests.strategies import examples


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def counts(draw) -> tuple[int, int, int]:
    """H, G and G' that are allowed."""
    heads = draw(st.integers(2, 12))
    kv_heads = draw(st.sampled_from(divisors(heads)[1:]))
    return heads, kv_heads, draw(st.sampled_from([d for d in divisors(heads) if d < kv_heads]))


def defined(x: torch.Tensor, heads: int, kv_heads: int, into: int, method: str) -> torch.Tensor:
    """By the definition, a query head at a time, in float64."""
    size, of_query = x.shape[0] // kv_heads, []
    for head in range(heads):
        start = head // (heads // kv_heads) * size
        of_query.append(x[start : start + size].double())
    group = heads // into
    groups = [of_query[n * group : (n + 1) * group] for n in range(into)]
    return torch.cat([sum(g) / group if method == "mean" else g[0] for g in groups])


@examples(40)
@given(counts(), st.sampled_from(["mean", "first"]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_pools_the_query_heads_of_each_group(counts, method, dtype, is_bias) -> None:
    heads, kv_heads, into = counts
    x = torch.randn(kv_heads * 3, *() if is_bias else (5,)).to(dtype)
    pooled = df.nn.pool_heads(x, heads, kv_heads, into, method)
    assert pooled.dtype == dtype
    torch.testing.assert_close(
        pooled.double(),
        defined(x, heads, kv_heads, into, method),
        rtol=torch.finfo(dtype).eps,
        atol=0 if method == "first" else 1e-6,
    )


@examples(40)
@given(counts(), st.sampled_from(["mean", "first"]))
def test_equal_heads_stay_as_they_are_bit_for_bit(counts, method) -> None:
    heads, kv_heads, into = counts
    assume(kv_heads % into == 0)  # else heads are shared by two groups, and no two groups could differ
    x = torch.randn(into, 3, 5)
    expanded = x.repeat_interleave(kv_heads // into, 0).flatten(0, 1)
    assert torch.equal(df.nn.pool_heads(expanded, heads, kv_heads, into, method), x.flatten(0, 1))


def test_the_mean_is_taken_in_float64() -> None:
    """In float32 the small heads would be lost beside the large one, which another takes away again."""
    x = torch.tensor([2.0**30, 1.0, 1.0, -(2.0**30)])
    assert df.nn.pool_heads(x, 4, 4, 1).item() == 0.5


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((8, 8, 3), "3 does not divide the 8 query heads"),
        ((8, 8, 8), "8 is not less than the 8 key heads"),
        ((8, 2, 4), "4 is not less than the 2 key heads"),
        ((8, 8, 0), "expected an int of at least 1, got 0"),
        ((8, 8, True), "expected an int of at least 1, got True"),
        ((8, 3, 2), "the 3 key heads that there are do not divide the 8"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(counts, words) -> None:
    assert words in heads_problem(*counts)
    with pytest.raises(ValueError, match=words):
        df.nn.pool_heads(torch.zeros(24, 2), *counts)


@pytest.mark.parametrize(
    ("x", "method", "words"),
    [
        (torch.zeros(7, 2), "mean", "rows of 4 key heads, got torch.float32 of shape \\[7, 2\\]"),
        (torch.zeros(8, 2, dtype=torch.int8), "mean", "got torch.int8.*before it is sharded or quantized"),
        (torch.tensor(1.0), "mean", "of shape \\[\\]"),
        (torch.zeros(8, 2), "last", 'expected "mean" or "first", got \'last\''),
    ],
)
def test_tensors_and_methods_that_are_none_are_refused(x, method, words) -> None:
    with pytest.raises(ValueError, match=words):
        df.nn.pool_heads(x, 4, 4, 2, method)
