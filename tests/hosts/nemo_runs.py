"""NeMo AutoModel's own Llama on CPUs: with eager attention on one process, or over ranks with distflash."""

import torch
import torch.distributed as dist
from nemo_automodel.components.models.llama.model import LlamaForCausalLM
from transformers import LlamaConfig

import distflash as df
from distflash.integrations import transformers as dft


def train(distributed: bool) -> dict[str, list[float]]:
    """Runs as a rank: losses and norms of the gradient."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        vocab_size=48, num_key_value_heads=2, **sizes, attn_implementation="distflash" if distributed else "eager"
    )
    cp = df.ContextParallel(dist.group.WORLD)
    if distributed:
        dft.register(cp)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for _ in range(3):
        ids = torch.randint(1, 48, (2, 29), generator=generator)
        batch = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 29, generator=generator) < 0.3, -100)}
        loss = model(**(dft.shard_batch(batch, cp) if distributed else batch)).loss
        model.zero_grad()
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= cp.world_size
        found["loss"].append(cp.mean(loss.detach(), 1, reduction="mean").item())
        found["grad_norm"].append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    dft.unregister()
    return found
