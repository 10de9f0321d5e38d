"""The Triton kernel on a GPU, against dense float64: the interpreter's cases, larger, and what only a GPU shows."""

from dataclasses import replace

import pytest
import torch

from distflash import masks
from distflash.geometry import Geometry
from distflash.intervals import build
from distflash.kernels import Triton
from distflash.kernels.base import Keys, Problem, Scores
from distflash.layouts import Contiguous
from distflash.partial import Partial
from distflash.plan import Pass
from tests import oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


@pytest.fixture(autouse=True)
def exact_oracle():
    """The oracle's float32 products must be float32 products."""
    torch.backends.cuda.matmul.allow_tf32 = False


# Blocks are larger than the interpreter's: sequences of up to 4K tokens visit full tiles and both borders of each.
@pytest.mark.parametrize("case", oracle.cases(), ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    oracle.check(Triton(), oracle.scaled(case, 9), "cuda")


@pytest.mark.parametrize("case", oracle.cases(), ids=lambda case: case.name)
def test_the_largest_scores(case):
    oracle.check(Triton(), oracle.scaled(case, 9), "cuda", maxima=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_many_tiles(dim, dtype):
    case = oracle.Case("long", seq_len=4001, heads=4, kv_heads=2, d_qk=dim, d_v=dim, dtype=dtype)
    oracle.check(Triton(), case, "cuda")


@pytest.mark.parametrize("case", oracle.cases()[::7], ids=lambda case: case.name)
def test_the_same_bits_every_time(case):
    case = oracle.scaled(case, 5)
    x = oracle.make_inputs(case, "cuda")
    first, second = oracle.run(Triton(), case, x), oracle.run(Triton(), case, x)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_offsets_beyond_two_to_the_31():
    """The last rows of a tensor of more than 2^31 elements, under a window that only the rows around them see."""
    T, H, D, tail = 2**19 + 64, 33, 128, 300
    geometry = Geometry.of_sequence(masks.Window(63, 0), Contiguous(), T, 1)
    rows = build(geometry, 0, 0)[0].to("cuda")
    q = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    k = torch.randn(1, T, 1, D, device="cuda", dtype=torch.bfloat16)
    into = Partial.empty(q, D, between=False)
    into.final.fill_(torch.nan)
    Triton().forward(q, (Keys(k, k, rows),), Pass(0, (0,), (rows,)), Scores(D**-0.5), into)

    case = oracle.Case("tail", masks.Window(63, 0), tail, heads=H, kv_heads=1, d_qk=D, d_v=D, dtype=torch.bfloat16)
    x = oracle.make_inputs(case, "cuda")
    x = replace(x, q=q[:, -tail:], k=k[:, -tail:], v=k[:, -tail:])
    truth = oracle.dense(x, torch.float64)["out"][:, 64:]
    plain = oracle.dense(x, torch.float32, stored=torch.bfloat16)["out"][:, 64:]
    oracle.assert_as_exact("out", into.final[:, -tail + 64 :], plain, truth, torch.bfloat16)


def test_other_lengths_do_not_recompile():
    """Passes differ in lengths and in their place in the ring; a compilation between two would stall every rank."""
    from distflash.kernels.triton.backward import dkdv_kernel, dq_kernel, statistics_kernel
    from distflash.kernels.triton.forward import forward_kernel

    kernels = (forward_kernel, statistics_kernel, dkdv_kernel, dq_kernel)

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def call(seq_len: int, world_size: int, rank: int) -> None:
        case = oracle.Case("", masks.Causal(), seq_len, world_size=world_size, rank=rank, dtype=torch.bfloat16)
        oracle.run(Triton(), case, oracle.make_inputs(case, "cuda"))

    call(512, 2, 0)
    before = compiled()
    for seq_len, world_size, rank in ((512, 2, 1), (333, 3, 1), (1024, 4, 3), (17, 2, 0), (2, 2, 0)):
        call(seq_len, world_size, rank)
    assert compiled() == before


def test_refuses_what_it_cannot_do():
    fine = Problem(torch.device("cuda"), torch.bfloat16, 4, 4, 128, 128)
    assert Triton().not_supported_reasons(fine) == []
    odd = replace(fine, device=torch.device("cpu"), dtype=torch.float64, d_qk=20, d_v=264)
    assert len(Triton().not_supported_reasons(odd)) == 4
