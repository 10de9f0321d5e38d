"""Checkpointing that keeps attention over a real ring, with FSDP2 and `torch.compile`: one forward per layer."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distflash as df
from distflash.recipes.config import ModelConfig
from distflash.recipes.fsdp import whole
from distflash.recipes.model import Decoder, loss_sum
from tests.counting import Counting

LAYERS, S = 2, 37


def step(checkpoint, fsdp, compiled):
    """Runs as a rank: loss and whole gradients, how often the kernel's forward ran, and in how many passes it does."""
    kernel = Counting()
    cp = df.ContextParallel(dist.group.WORLD, kernel=kernel)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(LAYERS, dim=32, heads=4, kv_heads=2, checkpoint_activations=checkpoint), cp)
    tokens, positions = torch.randint(0, 256, (1, S + 1)), cp.positions(S)
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    if fsdp:
        mesh = init_device_mesh("cpu", (cp.world_size,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    total = loss_sum(model(tokens[:, positions], S), tokens[:, positions + 1])
    loss = cp.mean(total, len(positions), reduction="mean" if fsdp else "sum")
    loss.backward()
    passes = len(cp.plan(df.Causal(), S).passes)
    return [loss.detach(), *(whole(p.grad) for p in model.parameters())], kernel.forwards, passes


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["replicated", "fsdp"])
def test_one_forward_a_layer_and_the_same_bits(fsdp, compiled, ranks_of):
    plain, kept = (ranks_of(2).run(step, checkpoint, fsdp, compiled) for checkpoint in (False, True))
    for (values, forwards, passes), (expected, _, _) in zip(kept, plain, strict=True):
        assert passes > 1 and forwards == LAYERS * passes
        assert all(map(torch.equal, values, expected))
    if compiled:  # and nothing was compiled away: it is the eager model, up to rounding
        for (values, *_), (eager, *_) in zip(kept, ranks_of(2).run(step, False, fsdp, False), strict=True):
            torch.testing.assert_close(values, eager)
