import pytest
import torch

import distflash as df
from distflash.transport import Simulator
from tests.dense import join

CLOSE = dict(rtol=1e-12, atol=1e-12)
S, DIM = 21, 16


def module(cp=None, **options):
    torch.manual_seed(0)
    return df.nn.SelfAttention(DIM, heads=4, kv_heads=2, cp=cp, **options).double()


def forward_and_backward(attention, x, dout, **options):
    x = x.clone().requires_grad_()
    out = attention(x, **options)
    out.backward(dout)
    return {"out": out.detach(), "dq": x.grad}, [p.grad for p in attention.parameters()]


@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
@pytest.mark.parametrize("mask", [df.Causal(), df.Causal() & df.Documents([0, 4, S])], ids=["causal", "documents"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_are_one_rank(world_size, mask, layout):
    x, dout = torch.randn(2, 2, S, DIM, dtype=torch.float64)
    expected, expected_parameters = forward_and_backward(module(), x, dout, mask=mask)

    def work(transport):
        cp = df.ContextParallel(transport, layout)
        return forward_and_backward(module(cp), cp.shard(x), cp.shard(dout), mask=mask, seq_len=S)

    parts, parameters = zip(*Simulator(world_size).run(work), strict=True)
    got = join(parts, layout, S)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE)
    for total, value in zip(map(sum, zip(*parameters, strict=True)), expected_parameters, strict=True):
        torch.testing.assert_close(total, value, **CLOSE)


def test_the_mask_of_the_call_goes_before_the_modules():
    x = torch.randn(1, S, DIM, dtype=torch.float64)
    assert torch.equal(module(mask=df.Full())(x, mask=df.Causal()), module()(x))
    assert not torch.equal(module(mask=df.Full())(x), module()(x))


@pytest.mark.parametrize("world_size", [1, 3])
def test_dropout_is_that_of_one_rank_and_of_training(world_size):
    x, dout = torch.randn(2, 2, S, DIM, dtype=torch.float64)
    seed = torch.tensor(5)
    expected, expected_parameters = forward_and_backward(module(dropout_p=0.3), x, dout, dropout_seed=5)

    def work(transport):
        cp = df.ContextParallel(transport)
        attention = module(cp, dropout_p=0.3)
        return forward_and_backward(attention, cp.shard(x), cp.shard(dout), seq_len=S, dropout_seed=seed)

    parts, parameters = zip(*Simulator(world_size).run(work), strict=True)
    got = join(parts, df.Zigzag(), S)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE)
    for total, value in zip(map(sum, zip(*parameters, strict=True)), expected_parameters, strict=True):
        torch.testing.assert_close(total, value, **CLOSE)
    plain = module()
    assert torch.equal(module(dropout_p=0.3).eval()(x), plain(x))
    assert not torch.equal(expected["out"], plain(x))


def rotate(x, *positions, theta=10000.0):
    """``x [B, T, heads, D]`` as queries; as keys it must be turned alike."""
    q, k = df.nn.RotaryEmbedding(x.shape[-1], theta)(x, x, torch.tensor(positions))
    assert torch.equal(q, k)
    return q


def test_rope_makes_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(i, j):
        return (rotate(q, i) * rotate(k, j)).sum()

    # Far out in the sequence as near its start: float32 holds each sine to 2^-24, and a score has 8 x 4 of them.
    unit = 2.0**-24 * float(q.norm() * k.norm())
    torch.testing.assert_close(score(2**20 + 7, 2**20 + 2), score(7, 2), rtol=0, atol=32 * unit)
    assert torch.equal(rotate(q, 0), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rope_is_the_rotation_of_pairs(dtype):
    """To a few units in the last place of the queries' own dtype."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype).view(1, 1, 1, 4) / 3
    pairs = torch.complex(x[..., :2].double(), x[..., 2:].double())
    turned = pairs * torch.exp(1j * 5 * torch.tensor([1.0, 0.1], dtype=torch.float64))
    expected = torch.cat([turned.real, turned.imag], -1).to(dtype)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(rotate(x, 5, theta=100.0), expected, rtol=4 * unit, atol=4 * unit)


def test_rope_takes_positions_of_each_sequence():
    x, positions = torch.randn(2, 3, 1, 4), ([0, 1, 2], [5, 6, 9])
    expected = torch.cat([rotate(x[b : b + 1], *positions[b]) for b in range(2)])
    assert torch.equal(rotate(x, *positions), expected)
    assert rotate(x.bfloat16(), *positions).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: df.nn.SelfAttention(10, 4), "heads: 4 does not divide dim=10"),
        (lambda: df.nn.SelfAttention(16, 4, 3), "kv_heads: 3 does not divide heads=4"),
        (
            lambda: df.nn.SelfAttention(16, 4, dropout_p=1.0),
            "dropout_p: expected a probability of at least 0 and below 1",
        ),
        (lambda: df.nn.SelfAttention(12, 4), "head_dim: rotary embedding needs an even head_dim, got 3"),
    ],
)
def test_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(("theta", "name"), [(10000.0, "x"), (None, "q")])
def test_a_batch_that_was_not_sharded_is_refused_on_every_rank(theta, name):
    def work(transport):
        cp = df.ContextParallel(transport)
        words = rf"{name}: 21 local tokens, but Zigzag\(\) gives rank {cp.rank} of 2 1[01] of seq_len=21; shard with"
        with pytest.raises(ValueError, match=words):
            module(cp, rope_theta=theta)(torch.randn(1, S, DIM, dtype=torch.float64), seq_len=S)
        return True

    assert all(Simulator(2).run(work))


def test_without_rope_and_with_another_head_dim():
    attention = module(rope_theta=None, head_dim=5)
    assert attention(torch.randn(1, 3, DIM, dtype=torch.float64)).shape == (1, 3, DIM)
    assert attention.k_proj.weight.shape == (10, DIM)


def make_cache(cp, batch=2, capacity=S):
    return df.Cache(cp, batch=batch, kv_heads=2, d_qk=4, capacity=capacity, dtype=torch.float64)


CHUNKS, STEPS = (9, 1, 2, 4), (1, 3, 1)  # together S; one token and fewer tokens than ranks are chunks too


def through_a_cache(attention, x, cp):
    """``[B, S, DIM]`` whole, chunk by chunk and then step by step."""
    cache, parts, done = make_cache(cp), [], 0
    for tokens in CHUNKS:
        chunk = x[:, done : done + tokens]
        out = attention(chunk if cp is None else cp.shard(chunk), seq_len=tokens, cache=cache)
        parts.append(out if cp is None else cp.unshard(out))
        done += tokens
    for tokens in STEPS:
        parts.append(attention.decode(x[:, done : done + tokens], cache=cache))
        done += tokens
    assert cache.length == done == S
    return torch.cat(parts, 1)


@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
@pytest.mark.parametrize("mask", [df.Causal(), df.Causal() & df.Window(5, 0)], ids=["causal", "window"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_chunks_and_steps_through_a_cache_are_the_whole_sequence(world_size, mask, layout):
    x = torch.randn(2, S, DIM, dtype=torch.float64)

    @torch.no_grad()
    def work(transport):
        cp = df.ContextParallel(transport, layout)
        return through_a_cache(module(cp, mask=mask), x, cp)

    expected = module(mask=mask)(x).detach()
    outs = Simulator(world_size).run(work)
    torch.testing.assert_close(outs[0], expected, **CLOSE)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    with torch.no_grad():
        torch.testing.assert_close(through_a_cache(module(mask=mask), x, None), expected, **CLOSE)


@torch.no_grad()
def test_positions_in_a_cache_are_those_of_each_sequence():
    """Prompts of 7 and 12 tokens, then steps of both together."""
    x, attention, cache = torch.randn(2, S, DIM, dtype=torch.float64), module(), make_cache(None)
    lengths, steps = (7, 12), 3
    for n, length in enumerate(lengths):
        attention(x[n : n + 1, :length], cache=cache[n])
    new = torch.stack([x[n, length : length + steps] for n, length in enumerate(lengths)])
    out = attention.decode(new, cache=cache)
    for n, length in enumerate(lengths):
        whole = attention(x[n : n + 1, : length + steps])
        torch.testing.assert_close(out[n], whole[0, length:], **CLOSE)


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (lambda cp: "a cache", "cache: expected a df.Cache, got 'a cache'"),
        (lambda cp: make_cache(cp, batch=1), r"x: is for 2 sequences, the cache for 1; .* cache\[n\]"),
        (lambda cp: make_cache(None), "cache: was made with .* make both with the same"),
    ],
)
@pytest.mark.parametrize("decoding", [False, True])
def test_a_cache_that_does_not_fit_is_refused_on_every_rank(cache, words, decoding):
    def work(transport):
        cp = df.ContextParallel(transport)
        attention, x = module(cp), torch.randn(2, 2, DIM, dtype=torch.float64)
        with torch.no_grad(), pytest.raises(ValueError, match=words):
            attention.decode(x, cache=cache(cp)) if decoding else attention(x, seq_len=4, cache=cache(cp))
        return True

    assert all(Simulator(2).run(work))


def test_a_gradient_through_a_cache_is_refused():
    with pytest.raises(ValueError, match="require a gradient, which does not go through a cache"):
        module()(torch.randn(2, 3, DIM, dtype=torch.float64), cache=make_cache(None))


@torch.no_grad()
def test_groups_of_one_share_caches():
    """As in the replay of `verify`, where a module has a group of one, and a cache of the step has none."""
    x, expected = torch.randn(2, S, DIM, dtype=torch.float64), module()
    attention = module(df.ContextParallel(df.transport.Alone()))
    attention.load_state_dict(expected.state_dict())
    got = attention(x[:, :5], cache=(cache := make_cache(None)))
    torch.testing.assert_close(got, expected(x[:, :5]), **CLOSE)
    torch.testing.assert_close(attention.decode(x[:, 5:6], cache=cache), expected(x[:, :6])[:, 5:], **CLOSE)
