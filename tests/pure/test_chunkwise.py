"""The same bits on any number of ranks, and exact."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.kernels import Reference
from distflash.kernels.base import Kernel
from distflash.transport import Simulator
from tests.dense import Problem, assert_exact, assert_no_less_exact, in_dtype, make_inputs, on_rank, on_ranks
from tests.oracle import Blind
from tests.strategies import examples, problems

CHUNK = 8
LAYOUTS = [df.WholeChunks(inner, CHUNK) for inner in (df.Zigzag(), df.Contiguous(), df.Striped())]
SCHEDULE = df.Reproducible(CHUNK)
# Tiles that cut chunks and what lies beside them.
KERNEL = Reference(block_q=6, block_k=18)

PROBLEMS = {
    "full": Problem(df.Full(), 53, heads=8, kv_heads=8),
    "causal, two of a batch": Problem(df.Causal(), 61, batch=2, heads=4, kv_heads=2, sinks=True),
    "window, softcap": Problem(df.Causal() & df.Window(20), 70, heads=8, softcap=3.0),
    "documents, ALiBi": Problem(df.Causal() & df.Documents([0, 3, 40, 41, 67]), 67, heads=4, kv_heads=4, alibi=True),
    "union": Problem(
        df.Causal() & (df.Window(9) | df.FirstTokens(2)) | Blind(30, 40), 59, 1, 8, 1, d_v=5, softcap=3.0, alibi=True,
        sinks=True,
    ),
    "rows of a batch": Problem(df.Rows([df.Causal(), df.Documents([0, 30, 37])]), 37, batch=2, sinks=True),
    "a chunk of queries": Problem(df.Causal(), 45, heads=4, q_start=11, q_len=27, sinks=True),
    "fewer tokens than ranks": Problem(df.Causal(), 3, sinks=True),
}  # fmt: skip


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert x.dtype == expected[name].dtype and torch.equal(x, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_bits_are_those_of_one_rank(name, dtype):
    p = in_dtype(PROBLEMS[name], dtype)
    x = make_inputs(p)
    one = on_ranks(p, x, 1, df.Contiguous(), KERNEL, SCHEDULE)
    for world_size, layout in zip((2, 4, 8), LAYOUTS, strict=True):
        assert_same_bits(on_ranks(p, x, world_size, layout, KERNEL, SCHEDULE), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_products_as_large_as_those_of_real_heads(dtype):
    """Where plain torch takes the paths of its fast products, in the default tiles."""
    p = Problem(df.Causal(), 601, heads=4, kv_heads=2, d_qk=64, d_v=64, dtype=dtype)
    x, layout = make_inputs(p), df.WholeChunks(df.Zigzag(), 64)
    one, *others = (on_ranks(p, x, W, layout, Reference(), df.Reproducible(64)) for W in (1, 2, 4))
    for got in others:
        assert_same_bits(got, one)


@examples(20)
@given(problems(), st.sampled_from([df.Zigzag(), df.Striped()]), st.integers(2, 8), st.integers(1, 40))
def test_bits_of_random_calls(p, inner, world_size, chunk):
    p = in_dtype(p, torch.float32)
    x, schedule = make_inputs(p), df.Reproducible(chunk)
    layout = df.WholeChunks(inner, chunk)
    one = on_ranks(p, x, 1, layout, KERNEL, schedule)
    assert_same_bits(on_ranks(p, x, world_size, layout, KERNEL, schedule), one)


@examples(40)
@given(problems(), st.sampled_from([df.Zigzag(), df.Striped()]), st.integers(1, 8), st.integers(1, 40))
def test_exact_in_float64(p, inner, world_size, chunk):
    x = make_inputs(p)
    got = on_ranks(p, x, world_size, df.WholeChunks(inner, chunk), KERNEL, df.Reproducible(chunk))
    assert_exact(p, x, got)


@pytest.mark.parametrize(("name", "dtype"), [("union", torch.float32), ("window, softcap", torch.bfloat16)], ids=str)
def test_no_less_exact_than_one_rank_of_a_ring(name, dtype):
    p = in_dtype(PROBLEMS[name], dtype)
    x = make_inputs(p)
    got = on_ranks(p, x, 4, LAYOUTS[0], KERNEL, SCHEDULE)
    assert_no_less_exact(p, x, got, on_ranks(p, x, 1, df.Zigzag(), KERNEL))


def test_a_ring_has_other_bits_on_other_numbers_of_ranks():
    """Else the tests above would hold of any schedule."""
    p = replace(PROBLEMS["causal, two of a batch"], dtype=torch.float32)
    x = make_inputs(p)
    one, four = (on_ranks(p, x, W, df.Zigzag(), KERNEL) for W in (1, 4))
    assert not any(torch.equal(one[name], four[name]) for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("world_size", [1, 4])
def test_bits_do_not_depend_on_strides_or_on_what_a_tensor_is_a_part_of(world_size):
    p = Problem(df.Causal(), 100, batch=2, heads=4, kv_heads=2, d_qk=16, d_v=16, dtype=torch.float32)
    x = make_inputs(p)

    def work(transport, changed):
        cp = df.ContextParallel(transport, LAYOUTS[0], SCHEDULE, KERNEL)
        q, k, v = (changed(cp.shard(t)).requires_grad_() for t in (x.q, x.k, x.v))
        out = df.attention(q, k, v, mask=p.mask, cp=cp, seq_len=p.seq_len)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), changed(cp.shard(x.dout)))

    def heads_first(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def within_another(t):
        return torch.cat([t.new_zeros(*t.shape[:-1], 3), t], -1)[..., 3:]

    plain, *others = (
        Simulator(world_size).run(lambda t, c=changed: work(t, c))
        for changed in (lambda t: t, heads_first, within_another)
    )
    for other in others:
        for got, expected in zip(other, plain, strict=True):
            assert all(map(torch.equal, got, expected))


@dataclass(frozen=True)
class Watched(Kernel):
    """The plain-torch kernel, and what it has been given."""

    calls: list = field(default_factory=list, compare=False, repr=False)

    def not_supported_reasons(self, problem):
        return []

    def forward(self, q, keys, each, scores, into):
        self.calls.append(("forward", q, keys[0].k, keys[0].v))
        KERNEL.forward(q, keys, each, scores, into)

    def preprocess(self, *tensors):
        return KERNEL.preprocess(*tensors)

    def backward(self, saved, keys, each, scores, dq, dkv):
        self.calls.append((each.gradients.value, saved.q, saved.dout, keys.k, keys.v))
        KERNEL.backward(saved, keys, each, scores, dq, dkv)


@pytest.mark.parametrize("name", ["window, softcap", "union"])
def test_kernel_calls_are_the_same_on_any_number_of_ranks(name):
    p = in_dtype(PROBLEMS[name], torch.float32)
    x = make_inputs(p)

    def calls(world_size):
        watched = Watched()
        on_ranks(p, x, world_size, LAYOUTS[0], watched, SCHEDULE)
        return sorted((what, *((t.shape, t.stride(), t.flatten().tolist()) for t in ts)) for what, *ts in watched.calls)

    one = calls(1)
    assert len(one) >= 3 * -(-p.seq_len // CHUNK)
    assert calls(4) == one


def test_the_first_rank_has_the_gradient_of_sinks():
    p = PROBLEMS["causal, two of a batch"]
    x = make_inputs(p)
    parts = Simulator(3).run(lambda t: on_rank(p, x, df.ContextParallel(t, LAYOUTS[0], SCHEDULE, KERNEL)))
    assert parts[0]["dsinks"].abs().min() > 0
    assert not any(part["dsinks"].any() for part in parts[1:])


@pytest.mark.parametrize("shape", [(0, 24), (1, 0)], ids=["no sequence", "no token"])
def test_nothing_to_attend_to(shape):
    def work(transport):
        cp = df.ContextParallel(transport, LAYOUTS[0], SCHEDULE)
        q, k, v = (cp.shard(torch.randn(*shape, heads, 8)).requires_grad_() for heads in (4, 2, 2))
        sinks = torch.zeros(4, requires_grad=True)
        df.attention(q, k, v, mask=df.Causal(), cp=cp, seq_len=shape[1], sinks=sinks).sum().backward()
        assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]
        return sinks.grad.tolist()

    assert Simulator(2).run(work) == [[0.0] * 4] * 2


def test_compiled_and_checkpointed_calls_have_the_same_bits():
    q, k, v, dout = torch.randn(4, 1, 50, 2, 8)

    def function(q, k, v):
        return df.attention(q, k, v, mask=df.Causal(), cp=cp).sin()

    def kept(q, k, v):
        return torch.utils.checkpoint.checkpoint(function, q, k, v, use_reentrant=False, context_fn=df.keep_attention)

    cp = df.ContextParallel(df.transport.Alone(), schedule=SCHEDULE)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)

    def results(f):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(f(*tensors), tensors, dout)

    for f in (compiled, kept):
        assert all(map(torch.equal, results(f), results(function)))
