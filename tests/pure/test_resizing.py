"""A resized cache gives the same results as the original."""

import pytest
import torch

import distflash as df
from distflash.resizing import resized
from distflash.transport import Alone, Simulator
from tests.tiny_models import relative


def tokens(n, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, heads, 8, generator=generator) for heads in (4, 2, 2)]


def filled(cp, capacity=64):
    """Two sequences of unequal length, one of them with tokens that all ranks had."""
    cache = df.Cache(cp, batch=2, kv_heads=2, d_qk=8, capacity=capacity, dtype=torch.float32)
    q, k, v = (cp.shard(x, 1) for x in tokens(23))
    df.attention(q, k, v, mask=df.Causal(), cp=cp, cache=cache, seq_len=23)
    df.decode(*tokens(3, seed=1), cache=cache)
    cache.truncate([26, 21])
    return cache


def next_step(cache, rows):
    q, k, v = (x[rows] for x in tokens(2, seed=2))
    return df.decode(q, k, v, cache=cache)


@pytest.mark.parametrize("rows", [None, [1], [0, 0, 1], [1, 0]])
@pytest.mark.parametrize("world_size", [1, 3])
def test_it_has_what_the_other_keeps_and_goes_on_alike(world_size, rows):
    def run(transport):
        cp = df.ContextParallel(transport)
        cache = filled(cp)
        chosen = [0, 1] if rows is None else rows
        other = resized(cache, 200, rows)
        assert (other.capacity, other.batch, other.lengths) == (
            200,
            len(chosen),
            tuple(cache.lengths[n] for n in chosen),
        )
        got = next_step(other, chosen)
        assert cache.lengths == (26, 21)  # memory is its own
        return relative(got, next_step(cache, [0, 1])[chosen])

    assert max(Simulator(world_size).run(run)) <= 1e-6


def test_what_does_not_fit_is_refused():
    cache = filled(df.ContextParallel(Alone()))
    with pytest.raises(
        ValueError, match="capacity: 26 tokens of a sequence are kept; expected at least as many, got 25"
    ):
        resized(cache, 25)
    assert resized(cache, 21, [1]).lengths == (21,)
    for sequences in ([], [2], [-1], [True, "a"]):
        with pytest.raises(ValueError, match="sequences: expected some integers from 0 to 1"):
            resized(cache, 64, sequences)
