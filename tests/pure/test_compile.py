"""A decoder block under `torch.compile`: one graph, and as exact as eager code."""

import shutil

import pytest
import torch

import distflash as df
from distflash.recipes.config import ModelConfig
from distflash.recipes.model import Block, Decoder, loss_sum
from distflash.transport import Alone
from tests.counting import Counting
from tests.oracle import assert_as_exact

S = 37
SHAPE = ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, ffn=48)
DOCUMENTS = df.Causal() & df.Documents([0, 5, 6, S])


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    torch._dynamo.reset()


def block(cp, dtype=torch.float32):
    torch.manual_seed(0)
    return Block(SHAPE, cp).to(dtype)


def results(function, module, x, mask, *, autocast=False):
    """Output and gradients by name."""
    x = x.to(next(module.parameters()).dtype).requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = function(x, S, mask)
    out.square().sum().backward()
    return {"out": out.detach(), "dx": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize("mask", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("cp", [None, df.ContextParallel(Alone())], ids=["alone", "group"])
def test_a_block_is_one_graph(cp, mask):
    explained = torch._dynamo.explain(block(cp))(torch.randn(2, S, SHAPE.dim), S, mask)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


# Compiling for the CPU takes a compiler and a quarter of a minute: once.
INDUCTOR = pytest.param("inductor", False, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"))


@pytest.mark.parametrize(("backend", "autocast"), [("aot_eager", False), ("aot_eager", True), INDUCTOR])
def test_a_compiled_block_is_as_exact_as_the_eager_one(backend, autocast):
    cp, x = df.ContextParallel(Alone()), torch.randn(2, S, SHAPE.dim)
    eager, exact = block(cp), block(cp, torch.float64)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    truth = results(exact, exact, x, DOCUMENTS)
    plain = results(eager, eager, x, DOCUMENTS, autocast=autocast)
    for name, got in results(compiled, eager, x, DOCUMENTS, autocast=autocast).items():
        assert_as_exact(name, got, plain[name], truth[name], plain[name].dtype)


def test_a_compiled_model_that_keeps_attention_runs_it_once():
    kernel = Counting()
    torch.manual_seed(0)
    model = Decoder(ModelConfig(2, 32, 4, 2, checkpoint_activations=True), df.ContextParallel(Alone(), kernel=kernel))
    tokens, labels = torch.randint(0, 256, (2, 1, S))

    def loss_and_gradients(function):
        model.zero_grad()
        loss = loss_sum(function(tokens, S), labels)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = loss_and_gradients(model)
    object.__setattr__(kernel, "forwards", 0)
    got = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert kernel.forwards == len(model.blocks)
    for mine, eager in zip(got, expected, strict=True):
        assert torch.equal(mine, eager)
