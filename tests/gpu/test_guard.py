"""Every kernel reads and writes only within its tensors, which have canaries on both sides."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from distflash import masks
from distflash.kernels import Hopper, Triton
from distflash.layouts import Contiguous, Zigzag
from tests import oracle
from tests.gpu.guard import Guard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]
on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
# Multiples of every tile, of some of them, of none; in a ring of two these are a rank's.
LENGTHS = [1, 64, 129, 512, 1000]
KERNELS = [Triton(), pytest.param(Hopper(), marks=pytest.mark.skipif(not on_hopper, reason="no Hopper GPU here"))]


def cases(d_qk: int, d_v: int, length: int) -> list[oracle.Case]:
    """One step; the first and the last of two steps on both ranks, where keys are that no query sees; grouped heads."""
    one = oracle.Case("one step", seq_len=length, heads=4, kv_heads=2, d_qk=d_qk, d_v=d_v, dtype=torch.bfloat16)
    two = replace(one, seq_len=2 * length, world_size=2, batch=2)
    blind = replace(two, mask=oracle.Blind(length // 3, length))
    return [
        one,
        replace(one, heads=2, batch=2, mask=masks.Window(70, 3)),
        *(replace(case, layout=layout, rank=rank) for case in (two, blind) for layout in (Zigzag(), Contiguous())
          for rank in (0, 1)),
    ]  # fmt: skip


def run(kernel: Hopper | Triton, case: oracle.Case, held_back: int) -> None:
    """The case between canaries gives what it gives without them, which other tests compare with float64."""
    x, guard = oracle.make_inputs(case, "cuda"), Guard()
    with guard:
        scores = {f.name: guard.guarded(getattr(x.scores, f.name)) for f in fields(x.scores)}
        values = {f.name: guard.guarded(getattr(x, f.name)) for f in fields(x) if f.name != "scores"}
        inside = replace(x, scores=type(x.scores)(**scores), **values)
        got = oracle.run(kernel, case, inside, held_back)
    guard.check()
    expected = oracle.run(kernel, case, x, held_back)
    for name in ("out", "lse", "dk", "dv"):
        assert torch.equal(got[name], expected[name]), name
    # On Hopper dQ is added up in another order in every run: float32 sums, rounded once.
    unit, sums = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps * expected["dq"].abs().amax().item()
    torch.testing.assert_close(got["dq"], expected["dq"], rtol=unit, atol=64 * sums)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("d_qk", "d_v"), DIMS)
def test_nothing_beyond_a_tensor_is_touched(kernel: Hopper | Triton, d_qk: int, d_v: int, length: int) -> None:
    for case in cases(d_qk, d_v, length):
        run(kernel, case, 0)
        if isinstance(kernel, Hopper) and case.world_size > 1:
            run(kernel, case, 1)


@pytest.mark.skipif(not on_hopper, reason="no GPU of compute capability 9.0 here")
@pytest.mark.parametrize(("d_qk", "d_v"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_keys_that_nobody_sees_may_hold_anything(d_qk: int, d_v: int) -> None:
    """Blocks of such keys are not read: NaN in them reaches no result."""
    case = oracle.Case("unseen", seq_len=1024, heads=4, kv_heads=2, d_qk=d_qk, d_v=d_v, dtype=torch.bfloat16)
    case = replace(case, layout=Zigzag(), world_size=2, rank=1)
    x = oracle.make_inputs(case, "cuda")
    unseen = ~x.visible.any(0)
    assert unseen.sum() == 256
    spoiled = replace(x, k=x.k.masked_fill(unseen[:, None, None], torch.nan),
                      v=x.v.masked_fill(unseen[:, None, None], torch.nan))  # fmt: skip
    got, expected = oracle.run(Hopper(), case, spoiled), oracle.run(Hopper(), case, x)
    truth, plain = oracle.dense(x, torch.float64), oracle.dense(x, torch.float32, stored=case.dtype)
    for name in ("out", "lse"):
        assert torch.equal(got[name], expected[name])
    for name in ("dq", "dk", "dv"):
        oracle.assert_as_exact(name, got[name], plain[name], truth[name], case.dtype)


def test_a_guard_finds_what_is_written_beyond_a_tensor() -> None:
    guard = Guard()
    with guard:
        x = torch.zeros(10, 7, device="cuda")
    x.as_strided((71,), (1,)).fill_(1.0)
    with pytest.raises(AssertionError, match="1 of 2 margins"):
        guard.check()
