"""CUDA graphs of training steps, replayed with new data, equal eager code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distflash as df
from tests.gpu.test_ring import device, on_hopper
from tests.ranks import Ranks

pytestmark = pytest.mark.gpu

Tensors = tuple[Tensor, ...]
SEQ_LEN, HEADS = 600, (4, 2, 2, 4)


def inputs(tokens: int, seed: int, dim: int = 64) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return tuple(
        torch.randn(1, tokens, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16) for heads in HEADS
    )


def step(cp: df.ContextParallel) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensors]:
    """Attention with the largest scores, forward and backward."""

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, found = df.attention(*leaves, mask=df.Causal(), cp=cp, seq_len=SEQ_LEN, return_max_logits=True)
        return out.detach(), found, *torch.autograd.grad(out, leaves, dout)

    return run


def replayed(cp: df.ContextParallel, dim: int = 64) -> list[tuple[Tensors, Tensors]]:
    """Results of a captured step and of an eager one, with the same new data."""
    run, tokens = step(cp), cp.seq_local(SEQ_LEN)
    static = inputs(tokens, cp.rank, dim)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(*static)
    found = []
    for seed in range(3):
        for x, new in zip(static, inputs(tokens, 100 * seed + cp.rank, dim), strict=True):
            x.copy_(new)
        graph.replay()
        captured = tuple(x.float().cpu() for x in results)
        found.append((captured, tuple(x.float().cpu() for x in run(*static))))
    return found


def assert_alike(found: list[tuple[Tensors, Tensors]]) -> None:
    for (out, largest, *captured), (expected, largest_expected, *eager) in found:
        assert torch.equal(out, expected) and torch.equal(largest, largest_expected)
        for a, b in zip(captured, eager, strict=True):
            # dQ is added up in another order each time: a unit of bfloat16 in the last place.
            assert (a - b).norm() <= 2**-8 * b.norm()


def test_a_captured_step_on_one_gpu():
    assert_alike(replayed(df.ContextParallel(df.transport.Alone())))


@pytest.mark.skipif(not on_hopper, reason="no GPU of compute capability 9.0 here")
def test_a_captured_step_that_adds_to_dq_in_order():
    """Its tables are the plan's: other calls that allocate memory between replays change nothing."""
    kernel = df.kernels.Hopper(deterministic=True)
    for captured, eager in replayed(df.ContextParallel(df.transport.Alone(), kernel=kernel), dim=128):
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def over_nccl() -> list[tuple[Tensors, Tensors]]:
    device()
    return replayed(df.ContextParallel(dist.group.WORLD))


def by_copies() -> list[tuple[Tensors, Tensors]]:
    return replayed(df.ContextParallel(df.transport.CopyEngine(dist.group.WORLD)))


def test_a_captured_step_over_nccl(ranks: Ranks):
    for found in ranks.run(over_nccl):
        assert_alike(found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs GPUs that reach one another's memory")
def test_a_captured_step_by_copy_engines(ranks: Ranks):
    for found in ranks.run(by_copies):
        assert_alike(found)


class Layer(nn.Module):
    """Projections and attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (8, 64)).split((4, 2, 2), 2)
        return df.attention(q, k, v, mask=df.Causal()).flatten(2)


def gradients(call: Callable[[Tensor], Tensor], layer: Layer, x: Tensor) -> Tensors:
    layer.zero_grad()
    out = call(x)
    out.float().square().mean().backward()
    assert layer.qkv.weight.grad is not None
    return out.detach().float().clone(), layer.qkv.weight.grad.float().clone()


def assert_same_gradients(graphed: Callable[[Tensor], Tensor], layer: Layer) -> None:
    eager = Layer()
    eager.load_state_dict(layer.state_dict())
    for seed in range(3):
        x = torch.randn(1, 300, 256, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()
        for a, b in zip(gradients(graphed, layer, x), gradients(eager, eager, x), strict=True):
            assert (a - b).norm() <= 2**-7 * b.norm()


def test_make_graphed_callables():
    layer = Layer()
    sample = torch.randn(1, 300, 256, device="cuda", dtype=torch.bfloat16)
    graphed = torch.cuda.make_graphed_callables(Layer(), (sample,))
    graphed.load_state_dict(layer.state_dict())
    assert_same_gradients(graphed, graphed)


def test_compiled_with_reduce_overhead():
    layer = Layer()
    compiled = torch.compile(layer, mode="reduce-overhead")

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    assert_same_gradients(call, layer)
