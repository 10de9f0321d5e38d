"""Attention dropout: its random numbers, and calls of `attention` against dense attention with the oracle's mask.

Statistical tests are of fixed seeds. With ideal random numbers each would fail for a share ALPHA of all seeds.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import distflash as df
from distflash import dropout
from distflash.transport import Alone, Simulator
from tests.counting import Counting
from tests.dense import Problem, assert_exact, assert_no_less_exact, in_dtype, make_inputs, on_rank, on_ranks
from tests.strategies import chunks, dropped, examples, layouts, problems, problems_of_rows, schedules

ALPHA = 1e-6
SEED = 0x123456789ABCDEF
HERE = torch.arange(256)


def numbers(seed=SEED, batch=2, heads=4, q=HERE, k=HERE):
    return dropout.numbers(torch.tensor(seed), batch, range(heads), q, k)


def bound(tests=1):
    """What the largest of so many standard normal numbers exceeds, in magnitude, with probability ALPHA at most."""
    return float(-torch.special.ndtri(torch.tensor(ALPHA / tests / 2, dtype=torch.float64)))


def assert_rates(kept, p, dim):
    """The share of kept pairs along ``dim`` is 1 - p: everywhere in the rest of the dimensions."""
    count = math.prod(kept.shape[d] for d in dim)
    z = (kept.double().mean(dim) - (1 - p)) / math.sqrt(p * (1 - p) / count)
    assert z.abs().max() < bound(z.numel())


# Salmon et al. 2011, of the authors' implementation: kat_vectors of Random123, philox2x32 7.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), 0, (0x257A3673, 0xCD26BE2A)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_philox_is_that_of_its_authors(counter, key, expected):
    words = dropout.philox(*(torch.tensor(x) for x in (*counter, key)))
    assert tuple(int(word) & 0xFFFFFFFF for word in words) == expected


def test_numbers_depend_on_positions_alone():
    """Any part of the pairs has the numbers that it has among all of them, also at positions far out."""
    whole = numbers()
    q, k = HERE[3::7], HERE.flip(0)[::5]
    assert torch.equal(numbers(q=q, k=k), whole[:, :, q][..., k])
    assert torch.equal(dropout.numbers(torch.tensor(SEED), 1, range(1, 3), HERE, HERE), whole[:1, 1:3])
    far = torch.tensor([2**31 - 1, 2**30 + 5])
    assert torch.equal(numbers(q=far.int(), k=HERE.int()), numbers(q=far))


@pytest.mark.parametrize("seed", [0, 1, -1, SEED])
def test_numbers_are_uniform(seed):
    """Chi-squared tests of the high and the low byte, and of both bytes' highest bits in neighbouring pairs."""
    x = numbers(seed)
    quartet = x[..., 0::2, 0::2] >> 14 | x[..., 1::2, 0::2] >> 14 << 2
    quartet |= x[..., 0::2, 1::2] >> 14 << 4 | x[..., 1::2, 1::2] >> 14 << 6
    samples = [x >> 8, x & 255, quartet]
    for sample in samples:
        counts, expected = sample.flatten().bincount(minlength=256), sample.numel() / 256
        chi_squared = ((counts - expected) ** 2 / expected).sum().double()
        p_value = torch.special.gammaincc(torch.tensor(255 / 2, dtype=torch.float64), chi_squared / 2)
        assert p_value > ALPHA / len(samples)


@pytest.mark.parametrize("p", [2**-16, 0.01, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-16])
def test_rates(p):
    """Of all pairs, and of every batch, head, row and column."""
    kept, share = df.dropout_mask(SEED, p, 2, 4, HERE, HERE), dropout.in_steps(p)
    assert abs(share - p) <= 2**-17
    assert_rates(kept[None], share, (1, 2, 3, 4))
    if 0.05 < p < 0.95:  # the normal distribution is a good approximation also of the few pairs of a row
        for dim in ((1, 2, 3), (0, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
            assert_rates(kept, share, dim)


PAIRS = {
    "heads": lambda x: (x[:, :-1], x[:, 1:]),
    "far heads": lambda x: (x[:, 0], x[:, -1]),
    "batches": lambda x: (x[0], x[1]),
    "heads and batches": lambda x: (x[0, 1:], x[1, :-1]),
    "queries and keys": lambda x: (x, x.transpose(2, 3)),
    **{f"rows {n}": lambda x, n=n: (x[:, :, n:], x[:, :, :-n]) for n in (1, 2, 8, 16, 128)},
    **{f"columns {n}": lambda x, n=n: (x[..., n:], x[..., :-n]) for n in (1, 2, 8, 16, 128)},
    **{f"diagonal {n}": lambda x, n=n: (x[:, :, n:, n:], x[:, :, :-n, :-n]) for n in (1, 8, 16)},
    **{f"antidiagonal {n}": lambda x, n=n: (x[:, :, n:, :-n], x[:, :, :-n, n:]) for n in (1, 8, 16)},
}
SEEDS = [SEED + 1, SEED ^ 1 << 32, SEED ^ 1 << 62, -SEED, 0]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_independent(p):
    """No correlation between heads, batches, rows, columns, diagonals and seeds."""
    kept = df.dropout_mask(SEED, p, 2, 4, HERE, HERE)
    pairs = {name: of(kept) for name, of in PAIRS.items()}
    pairs |= {f"seed {seed}": (kept, df.dropout_mask(seed, p, 2, 4, HERE, HERE)) for seed in SEEDS}
    pairs |= {"next layer, next seed": (kept[:, 1:], df.dropout_mask(SEED + 1, p, 2, 4, HERE, HERE)[:, :-1])}
    for name, (a, b) in pairs.items():
        a, b = (x.double().flatten() - (1 - p) for x in (a, b))
        if name == "queries and keys":
            off = ~torch.eye(len(HERE), dtype=torch.bool).expand(kept.shape).flatten()
            a, b = a[off], b[off]  # each pair counts twice in the sum, which makes it 2 ** 0.5 times as wide
        z = (a * b).sum() / (p * (1 - p)) / math.sqrt(len(a) * (2 if name == "queries and keys" else 1))
        assert abs(z) < bound(len(pairs)), name


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_out_and_gradients_of_values_are_unbiased(p):
    """Their mean over 4,000 sequences of equal tensors is that without dropout. Their variance is known."""
    N, T, H, D = 4000, 12, 2, 3
    torch.manual_seed(0)
    q, k, v, dout = (x.expand(N, -1, -1, -1) for x in torch.randn(4, 1, T, H, D, dtype=torch.float64))
    v = v.clone().requires_grad_()
    out = df.attention(q, k, v, mask=df.Causal(), dropout_p=p, dropout_seed=SEED)
    out.backward(dout)
    P = torch.einsum("ihd,jhd->hij", q[0], k[0]) * D**-0.5
    P = P.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    of_one_pair = dropout.in_steps(p) / (1 - dropout.in_steps(p)) / N
    for got, product, other in ((out, "hij,jhd->ihd", v[0]), (v.grad, "hij,ihd->jhd", dout[0])):
        expected = torch.einsum(product, P, other)
        deviation = (torch.einsum(product, P.square(), other.square()) * of_one_pair).sqrt()
        z = (got.mean(0) - expected) / deviation
        assert z.abs().max() < bound(z.numel())
        assert z.square().mean() > 0.2  # it does vary


@examples(25)
@given(dropped(problems(24)), layouts, st.integers(1, 8), schedules)
def test_exact_in_float64(p, layout, world_size, schedule):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, schedule=schedule))


@examples(15)
@given(dropped(chunks()), layouts, st.integers(1, 6), schedules)
def test_exact_for_some_queries(p, layout, world_size, schedule):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, schedule=schedule))


@examples(15)
@given(dropped(problems_of_rows()), layouts, st.integers(1, 6), schedules)
def test_exact_for_a_mask_of_each_sequence(p, layout, world_size, schedule):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, schedule=schedule))


UNION = Problem(
    df.Causal() & (df.Window(9) | df.FirstTokens(2)) | df.Chunked(5),
    61,
    batch=2,
    heads=8,
    kv_heads=4,
    softcap=2.0,
    alibi=True,
    sinks=True,
    dropout_p=0.4,
    dropout_seed=SEED,
)
MANY = [
    (3, df.Zigzag(), df.Ring()),
    (4, df.Striped(), df.AllGather(2)),
    (4, df.Zigzag(), df.DoubleRing(2)),
    (3, df.Contiguous(), df.PassQuery()),
    (4, df.Zigzag(), df.Ulysses()),
    (8, df.Zigzag(), df.Ulysses()),
    (4, df.WholeChunks(df.Zigzag(), 8), df.Reproducible(8)),
]


@pytest.mark.parametrize(("world_size", "layout", "schedule"), MANY, ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["one mask", "masks of rows"])
def test_exact_in_small_tiles(world_size, layout, schedule, rows):
    p = replace(UNION, mask=df.Rows([UNION.mask, df.Causal()])) if rows else UNION
    x = make_inputs(p)
    tiles = df.kernels.Reference(block_q=16, block_k=24)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, tiles, schedule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_less_exact_than_one_rank(dtype):
    p = in_dtype(UNION, dtype)
    x = make_inputs(p)
    assert_no_less_exact(p, x, on_ranks(p, x, 4, df.Zigzag()), on_ranks(p, x, 1, df.Zigzag()))


def test_the_same_bits_on_any_number_of_ranks():
    x = make_inputs(UNION)
    layout, schedule = df.WholeChunks(df.Zigzag(), 8), df.Reproducible(8)
    one, *others = (on_ranks(UNION, x, W, layout, schedule=schedule) for W in (1, 2, 4))
    for other in others:
        assert all(torch.equal(other[name], one[name]) for name in one)


def test_lse_is_that_of_all_keys():
    x = make_inputs(UNION)
    without = on_rank(replace(UNION, dropout_p=0.0), x, None)
    assert torch.equal(on_rank(UNION, x, None)["lse"], without["lse"])


def test_gradients_of_finite_differences():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, sinks):
        options = dict(mask=df.Causal(), dropout_p=0.5, dropout_seed=3, return_lse=True)
        return df.attention(q, k, v, sinks=sinks, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


def qkv(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return [torch.randn(2, 13, heads, 8, dtype=dtype).to(device).requires_grad_() for heads in (4, 2, 2)]


def results(function, *tensors):
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors[:3])]


def attend(q, k, v, seed, p=0.3):
    return df.attention(q, k, v, mask=df.Causal(), dropout_p=p, dropout_seed=seed)


@pytest.mark.parametrize("p", [0, 0.0, -0.0, 1e-6], ids=str)
def test_no_dropout_changes_no_bit_and_reaches_no_kernel(p):
    """Below 2^-17 the probability rounds to 0."""
    seen = []

    class Watching(df.kernels.Reference):
        def forward(self, q, keys, each, scores, into):
            seen.append(scores.dropout)
            super().forward(q, keys, each, scores, into)

    cp = df.ContextParallel(Alone(), kernel=Watching())

    def call(q, k, v):
        return df.attention(q, k, v, cp=cp, dropout_p=p, dropout_seed=SEED)

    got, expected = results(call, *qkv()), results(df.attention, *qkv())
    assert all(map(torch.equal, got, expected)) and seen == [None]


def test_the_probability_is_rounded_once():
    """0.3 and its nearest step are one specification."""
    cp = df.ContextParallel(Alone())
    for p in (0.3, round(0.3 * 2**16) / 2**16):
        df.attention(*qkv(), cp=cp, dropout_p=p, dropout_seed=0)
    assert cp.calls.prepare.cache_info().misses == 1


@pytest.mark.parametrize("seed", [0, -5, SEED])
def test_a_seed_is_an_int_or_a_tensor(seed):
    pair = [results(attend, *qkv(), each) for each in (seed, torch.tensor(seed))]
    assert all(map(torch.equal, *pair))
    other = results(attend, *qkv(), seed + 1)
    assert not torch.equal(other[0], pair[0][0])


@pytest.mark.parametrize("seed", [3, torch.tensor(3, device="meta")], ids=["int", "tensor"])
def test_no_seed_is_read(seed):
    """Tensors of the device "meta" have no values."""
    assert results(attend, *qkv(device="meta"), seed)[1].shape == (2, 13, 4, 8)


def test_a_seed_that_changes_before_backward_raises():
    seed = torch.tensor(3)
    out = attend(*qkv(), seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_checkpointing_drops_the_same_pairs(keep):
    kernel = Counting()
    cp = df.ContextParallel(Alone(), kernel=kernel)

    def block(q, k, v, seed):
        once = df.attention(q.tanh(), k, v, cp=cp, dropout_p=0.3, dropout_seed=seed)
        return df.attention(once, k, v, cp=cp, dropout_p=0.3, dropout_seed=seed + 1)

    def checkpointed(*tensors):
        return checkpoint(block, *tensors, use_reentrant=False, **({"context_fn": df.keep_attention} if keep else {}))

    for seed in (3, torch.tensor(3)):
        before = kernel.forwards
        got = results(checkpointed, *qkv(), seed)
        assert kernel.forwards - before == (2 if keep else 4)
        assert all(map(torch.equal, got, results(block, *qkv(), seed)))


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensors", "ints"])
def test_a_compiled_call_takes_new_seeds_without_being_compiled_again(as_tensor):
    """An int becomes an input of the graph when it changes for the first time, as torch has it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seed in range(3, 23):
        seed = torch.tensor(seed) if as_tensor else seed
        pair = [results(function, *qkv(), seed) for function in (compiled, attend)]
        assert all(map(torch.equal, *pair))
    assert counter.frame_count == (1 if as_tensor else 2)


def test_probabilities_can_be_data_of_a_compiled_call():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    for step in range(1, 8):
        pair = [results(function, *qkv(), torch.tensor(5), step / 10) for function in (compiled, attend)]
        assert all(map(torch.equal, *pair))
    assert counter.frame_count == 1


def test_ranks_of_different_seeds_raise():
    def work(transport):
        cp = df.ContextParallel(transport)
        seed = torch.tensor(3 + transport.rank)
        with pytest.raises(ValueError, match="the value of dropout_seed differs between rank 0 and rank 1"):
            df.attention(*qkv(), cp=cp, dropout_p=0.1, dropout_seed=seed)

    Simulator(2).run(work)


def test_ranks_of_different_probabilities_raise():
    def work(transport):
        cp = df.ContextParallel(transport)
        with pytest.raises(ValueError, match="dropout_p differs between rank 0 and rank 1"):
            df.attention(*qkv(), cp=cp, dropout_p=0.1 + 0.1 * transport.rank, dropout_seed=1)

    Simulator(2).run(work)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("p: expected a probability of at least 0 and below 1, got 1", (0, 1, 1, 1, HERE, HERE)),
        ("q_positions: expected integers", (0, 0.1, 1, 1, HERE.float(), HERE)),
        ("k_positions: expected integers", (0, 0.1, 1, 1, HERE, HERE[None])),
    ],
)
def test_wrong_arguments_of_the_oracle(words, arguments):
    with pytest.raises(ValueError, match=words):
        df.dropout_mask(*arguments)


@pytest.mark.parametrize("seed", [torch.tensor([1, 2]), torch.tensor(1.5), 2**63, True, None], ids=repr)
def test_the_oracle_refuses_what_is_no_seed(seed):
    i = torch.arange(3)
    with pytest.raises(ValueError, match=r"^seed: expected an int that fits into int64"):
        df.dropout_mask(seed, 0.5, 1, 2, i, i)


@pytest.mark.parametrize("p", [-0.1, 1.0, None, True], ids=repr)
def test_the_oracle_refuses_what_is_no_probability(p):
    i = torch.arange(3)
    with pytest.raises(ValueError, match=r"^p: expected a probability"):
        df.dropout_mask(1, p, 1, 2, i, i)
