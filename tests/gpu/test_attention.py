"""`df.attention` on one GPU, through autograd and torch.compile, against dense float64."""

import pytest
import torch

import distflash as df
from tests import dense
from tests.dense import Problem
from tests.gpu import problems

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=problems.name_of)
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_forward_and_gradients_against_float64(name: str, dtype: torch.dtype) -> None:
    p = dense.in_dtype(problems.PROBLEMS[name], dtype)
    x = dense.make_inputs(p)
    got = problems.to_cpu(dense.on_rank(p, problems.on(x, "cuda"), None))
    truth = dense.dense(p, x)
    assert got.keys() == truth.keys()
    for result, right in truth.items():
        assert torch.equal(got[result] == -torch.inf, right == -torch.inf)
        seen = right > -torch.inf
        error = (got[result].double()[seen] - right[seen]).norm() / right[seen].norm().clamp_min(1e-3)
        assert error < problems.BARS[dtype], f"{result}: {error:.2e}"


def test_a_kernel_for_gpus_is_what_runs() -> None:
    """A GPU test that ran the plain-torch kernel would prove nothing."""
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    kernel = df.kernels.Hopper() if on_hopper else df.kernels.Triton()
    problem = df.kernels.Problem(q.device, q.dtype, heads=2, kv_heads=2, d_qk=64, d_v=64)
    assert kernel.not_supported_reasons(problem) == []
    cp = df.ContextParallel(df.transport.Alone(), kernel=kernel)
    mask = df.Causal()
    torch.testing.assert_close(
        df.attention(q, q, q, mask=mask), df.attention(q, q, q, mask=mask, cp=cp), rtol=0, atol=0
    )


def test_compiled_equals_eager() -> None:
    p = Problem(seq_len=300, heads=4, kv_heads=2, d_qk=64, d_v=64, dtype=torch.bfloat16)
    x = problems.on(dense.make_inputs(p), "cuda")

    def loss_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (df.attention(q, k, v, mask=df.Causal()) * x.dout).float().sum()

    def gradients(function):
        q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
        return torch.autograd.grad(function(q, k, v), (q, k, v))

    compiled = torch.compile(loss_of, fullgraph=True)
    # Not bit by bit: the Hopper kernel adds up dQ in the order in which blocks come by.
    for got, expected in zip(gradients(compiled), gradients(loss_of), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_call_once_warm_waits_for_nothing() -> None:
    """No copy to the host and no synchronisation: the host runs ahead of the device."""
    q = torch.randn(1, 512, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for warm in (False, True):
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            out = df.attention(q, q, q, mask=df.Causal())
            out.backward(torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")
