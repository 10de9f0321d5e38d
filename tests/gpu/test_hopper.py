"""The Hopper kernel on a GPU, against dense float64: the portable kernel's cases that it supports."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import distflash as df
from distflash import masks
from distflash.geometry import Geometry
from distflash.intervals import build
from distflash.kernels import Hopper
from distflash.kernels.base import KeyGradient, Keys, QueryGradient, Scores
from distflash.kernels.hopper.tiles import backward_tile, forward_tile
from distflash.layouts import Contiguous, Zigzag
from distflash.partial import Partial
from distflash.plan import Pass
from tests import oracle

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not on_hopper, reason="no GPU of compute capability 9.0 here")]

DIMS = {32: 128, 40: 64}


def half(case: oracle.Case) -> oracle.Case:
    """The case in a dtype and at head dims that the kernel takes."""
    dtype = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    dims = {name: DIMS.get(getattr(case, name), getattr(case, name)) for name in ("d_qk", "d_v")}
    return replace(case, dtype=dtype, alibi=False, **dims)


CASES = [half(case) for case in oracle.cases()]
SHORT = forward_tile(64, 64, 0.0)
LONG = [forward_tile(64, 64, 1e6), *(replace(SHORT, in_turn=a, halves=b) for a, b in ((1, 0), (0, 1)))]


@pytest.fixture(autouse=True)
def exact_oracle():
    """The oracle's float32 products must be float32 products."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    oracle.check(Hopper(), oracle.scaled(case, 9), "cuda")


@pytest.mark.parametrize("held_back", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_largest_scores(case, held_back):
    held_back = held_back if case.world_size > 1 else 0
    oracle.check(Hopper(), oracle.scaled(case, 9), "cuda", held_back, maxima=True)


def test_the_largest_scores_change_nothing_else():
    """Replayed launches with and without them do not take each other's place."""
    case = replace(CASES[0], d_qk=128, d_v=128, seq_len=900)
    x = oracle.make_inputs(case, "cuda")
    plain = oracle.run(Hopper(), case, x)
    for maxima in (True, False, True):
        got = oracle.run(Hopper(), case, x, maxima=maxima)
        assert torch.equal(got["out"], plain["out"]) and torch.equal(got["lse"], plain["lse"])
        assert not maxima or torch.equal(got["max_logits"], oracle.run(Hopper(), case, x, maxima=True)["max_logits"])


@pytest.mark.parametrize("case", [case for case in CASES if case.world_size > 1], ids=lambda case: case.name)
def test_two_sources_in_one_pass(case):
    oracle.check(Hopper(), oracle.scaled(case, 9), "cuda", held_back=1)


@pytest.mark.parametrize("case", [case for case in CASES if case.world_size > 1], ids=lambda case: case.name)
@pytest.mark.parametrize("held_back", [0, 1])
def test_all_rows_in_all_passes(case, held_back):
    oracle.check(Hopper(), oracle.scaled(case, 9), "cuda", held_back, live=False)


def window_rings(world_size: int, d_qk: int, d_v: int) -> list[oracle.Case]:
    return oracle.window_rings(world_size, 1500, heads=4, kv_heads=2, d_qk=d_qk, d_v=d_v, dtype=torch.bfloat16)


@pytest.mark.parametrize("held_back", [0, 1])
@pytest.mark.parametrize(
    "case",
    [
        *(case for dims in ((64, 64), (128, 128), (192, 128), (256, 256)) for case in window_rings(3, *dims)),
        *(case for dims in ((64, 64), (128, 128)) for case in window_rings(8, *dims)),
    ],
    ids=lambda case: f"{case.d_qk}/{case.d_v}, {case.name}",
)
def test_rows_left_out_of_passes(case, held_back):
    """Also where no row is left: a source of which the rank sees nothing is a pass here."""
    oracle.check(Hopper(), case, "cuda", held_back)


@pytest.mark.parametrize("held_back", [0, 1])
@pytest.mark.parametrize("tile", LONG, ids=repr)
def test_rows_left_out_by_any_tile(tile, held_back):
    """With sinks, several of a batch, and softcap; blocks of 192 queries, too."""
    for case in window_rings(3, 64, 64):
        case = replace(case, batch=2, sinks=True, softcap=9.0)
        oracle.check(Hopper(forward_tile=tile), case, "cuda", held_back)


@pytest.mark.parametrize("programs", [1, 3])
def test_rows_left_out_by_few_programs(programs):
    """Each works on many blocks, and passes by many of heads that have begun."""
    kernel = Hopper(margin=torch.cuda.get_device_properties(0).multi_processor_count - programs)
    for case in window_rings(3, 64, 64):
        oracle.check(kernel, replace(case, heads=8, kv_heads=8), "cuda", held_back=6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_qk", "d_v"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_many_tiles(d_qk, d_v, dtype):
    case = oracle.Case("long", seq_len=4001, heads=4, kv_heads=2, d_qk=d_qk, d_v=d_v, dtype=dtype)
    oracle.check(Hopper(), case, "cuda")


@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("mask", [masks.Causal(), masks.Window(300, 100)], ids=repr)
@pytest.mark.parametrize(("d_qk", "d_v"), [(192, 128), (256, 256), (136, 136), (256, 96), (256, 192)])
def test_wide_heads(d_qk, d_v, mask, softcap):
    case = oracle.Case("wide heads", mask, seq_len=1501, heads=4, kv_heads=2, d_qk=d_qk, d_v=d_v, dtype=torch.bfloat16)
    case = replace(case, batch=2, softcap=softcap)
    oracle.check(Hopper(), case, "cuda")
    oracle.check(Hopper(), replace(case, world_size=2, rank=1), "cuda", held_back=1)


@pytest.mark.parametrize("tile", LONG, ids=repr)
@pytest.mark.parametrize("world_size", [1, 2])
def test_tiles_for_many_keys(tile, world_size):
    case = oracle.Case("wide", seq_len=1501, heads=4, kv_heads=2, d_qk=64, d_v=64, dtype=torch.bfloat16, softcap=9.0)
    case = replace(case, world_size=world_size)
    oracle.check(Hopper(forward_tile=tile), case, "cuda")
    if world_size > 1:
        oracle.check(Hopper(forward_tile=tile), case, "cuda", held_back=1)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_both_ways_of_adding_up(dim, direct):
    tile = replace(backward_tile(dim, dim), direct=direct)
    case = oracle.Case("ways", seq_len=1501, heads=4, kv_heads=2, d_qk=dim, d_v=dim, dtype=torch.bfloat16, batch=2)
    oracle.check(Hopper(backward_tile=tile), case, "cuda")
    oracle.check(Hopper(backward_tile=tile), replace(case, world_size=2, rank=1), "cuda", held_back=1)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_maximum_that_moves(sign):
    """Scores that rise, or fall, by a little from tile to tile and by hundreds in all."""
    case = oracle.Case("slope", masks.Full(), seq_len=2048, heads=2, d_qk=64, d_v=64, dtype=torch.float16)
    x = oracle.make_inputs(case, "cuda")
    slope = torch.linspace(0, 40 * sign, 2048, device="cuda", dtype=torch.float16).view(1, -1, 1, 1)
    x = replace(x, q=x.q.abs(), k=slope.expand_as(x.k).contiguous())
    got = oracle.run(Hopper(), case, x)
    truth, plain = oracle.dense(x, torch.float64), oracle.dense(x, torch.float32, stored=case.dtype)
    for name, dtype in (("out", case.dtype), ("lse", torch.float32)):
        oracle.assert_as_exact(name, got[name], plain[name], truth[name], dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_exact_in_order(case):
    oracle.check(Hopper(deterministic=True), oracle.scaled(case, 9), "cuda")


@pytest.mark.parametrize("case", [case for case in CASES if case.world_size > 1], ids=lambda case: case.name)
def test_some_heads_in_order(case):
    """Passes over some of the key heads, of which each has semaphores of its own."""
    oracle.check(Hopper(deterministic=True), oracle.scaled(case, 9), "cuda", held_back=1)


ORDERED = oracle.Case("ordered", seq_len=1501, heads=4, kv_heads=2, d_qk=64, d_v=64, dtype=torch.bfloat16, batch=2)
IN_ORDER = {
    "causal": ORDERED,
    "full": replace(ORDERED, mask=masks.Full()),
    "window": replace(ORDERED, mask=masks.Window(300, 100)),
    "documents": replace(ORDERED, mask=masks.Causal() & masks.Documents((0, 3, 700, 701, 1501))),
    "keys that nobody sees": replace(ORDERED, mask=oracle.Blind(300, 900)),
    "softcap": replace(ORDERED, softcap=9.0, sinks=True),
    "one head": replace(ORDERED, heads=1, kv_heads=1, batch=1),
    "one source of two": replace(ORDERED, world_size=2, rank=1),
    "zigzag": replace(ORDERED, layout=Zigzag(), world_size=3, rank=2, seq_len=4001),
}


@pytest.mark.parametrize("name", IN_ORDER)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("programs", [1, 7, 0])
def test_in_order_on_any_number_of_programs(name, dim, programs):
    """Also where few programs work on many blocks: none waits for a block that none has."""
    margin = torch.cuda.get_device_properties(0).multi_processor_count - programs if programs else 0
    case = replace(IN_ORDER[name], d_qk=dim, d_v=dim)
    oracle.check(Hopper(deterministic=True, margin=margin), case, "cuda")


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=repr)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_same_bits_in_a_hundred_runs(dim, mask):
    kernel = Hopper(deterministic=True)
    case = replace(ORDERED, mask=mask, seq_len=2048, heads=16, kv_heads=4, d_qk=dim, d_v=dim)
    x = oracle.make_inputs(case, "cuda")
    first = oracle.run(kernel, case, x)
    for _ in range(100):
        for name, value in oracle.run(kernel, case, x).items():
            assert torch.equal(value, first[name]), name


def test_the_same_bits_on_other_grids():
    """What a program works on, and when, changes nothing."""
    case = replace(ORDERED, seq_len=2048)
    x = oracle.make_inputs(case, "cuda")
    kernels = [Hopper(deterministic=True, margin=margin) for margin in (0, 1, 100, 131)]
    first, *others = (oracle.run(kernel, case, x) for kernel in kernels)
    for other in others:
        assert torch.equal(other["dq"], first["dq"])


@pytest.mark.parametrize("case", CASES[::9], ids=lambda case: case.name)
def test_the_same_bits_every_time_if_asked(case):
    """Also by the portable backward, at other head dims."""
    case = oracle.scaled(case, 5)
    x = oracle.make_inputs(case, "cuda")
    kernel = Hopper(deterministic=True)
    first, second = oracle.run(kernel, case, x), oracle.run(kernel, case, x)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("margin", [1, 131])
def test_any_number_of_programs(margin):
    case = oracle.Case("few", seq_len=1500, heads=4, kv_heads=2, d_qk=128, d_v=128, dtype=torch.bfloat16, batch=2)
    oracle.check(Hopper(margin=margin), case, "cuda")


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("programs", [2, 0])
@pytest.mark.parametrize("deterministic", [False, True])
def test_few_keys_that_many_queries_share(dim: int, programs: int, deterministic: bool):
    """They are copied for each query head where there are programs enough; not where there are two."""
    margin = torch.cuda.get_device_properties(0).multi_processor_count - programs if programs else 0
    kernel = Hopper(deterministic=deterministic, margin=margin)
    sizes = (2, 1500, 4, dim), (2, 100, 2, dim), (2, 100, 2, dim), (2, 1500, 4, dim)
    q, k, v, dout = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    assert kernel._few(q, k) is not bool(programs)
    cp = df.ContextParallel(df.transport.Alone(), kernel=kernel)
    ours = gradients(lambda *x: df.attention(*x, mask=df.Full(), q_len=1500, cp=cp), (q, k, v), dout)
    exact = gradients(dense, (q.double(), k.double(), v.double()), dout.double())
    bars = gradients(dense, (q, k, v), dout)
    for name, got, bar, truth in zip(("dq", "dk", "dv"), ours, bars, exact, strict=True):
        assert (got.double() - truth).norm() <= 1.5 * (bar.double() - truth).norm(), name


def gradients(call, x, dout):
    leaves = [y.detach().requires_grad_() for y in x]
    return torch.autograd.grad(call(*leaves), leaves, dout)


def dense(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)


def test_work_is_shared_out_anew_in_every_launch():
    """The counters are back at zero, also where there are fewer blocks than multiprocessors."""
    for seq_len in (40, 3000):
        q = torch.randn(1, seq_len, 8, 64, device="cuda", dtype=torch.float16)
        rows = build(Geometry.of_sequence(masks.Causal(), Contiguous(), seq_len, 1), 0, 0)[0].to("cuda")
        into = Partial.empty(q, 64, between=False)
        scores, only, keys = Scores(64**-0.5), Pass(0, (0,), (rows,)), Keys(q, q, rows)
        Hopper().forward(q, (keys,), only, scores, into)
        assert into.counter.tolist() == [0, 0]
        saved = Hopper().preprocess(q, into.final, into.lse, q, None)
        dq = QueryGradient(torch.empty_like(q), None)
        dkv = KeyGradient(torch.empty_like(q), torch.empty_like(q))
        Hopper().backward(saved, keys, only, scores, dq, dkv)
        assert saved.counter.tolist() == [0, 0]


def test_other_lengths_do_not_recompile():
    """Passes differ in lengths and in their place in the ring; a compilation between two would stall every rank."""
    from distflash.kernels.hopper.backward import backward_kernel
    from distflash.kernels.hopper.forward import forward_kernel
    from distflash.kernels.hopper.fragments import round_kernel

    def compiled() -> int:
        kernels = (forward_kernel, backward_kernel, round_kernel)
        return sum(len(c[0]) for kernel in kernels for c in kernel.device_caches.values())

    def call(seq_len: int) -> None:
        case = oracle.Case("any", seq_len=seq_len, heads=4, d_qk=64, d_v=64, dtype=torch.bfloat16, world_size=3, rank=1)
        oracle.run(Hopper(), case, oracle.make_inputs(case, "cuda"))

    call(1024)
    before = compiled()
    for seq_len in (1536, 1000, 999, 333):
        call(seq_len)
    assert compiled() == before
