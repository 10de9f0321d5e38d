"""Train with Lightning, each sequence spread over the ranks of a group.

    torchrun --nproc-per-node 2 examples/lightning_module.py
    torchrun --nproc-per-node 4 examples/lightning_module.py --context 2    # 2 data ranks x 2 that share a sequence

A tiny random model on random tokens, on CPUs where there are no GPUs.
"""

from __future__ import annotations

import argparse
import os

import lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler

import distflash as df


class Decoder(lightning.LightningModule):
    """Attention layers between an embedding and a head; context: how many ranks share a sequence."""

    def __init__(self, context: int, seq_len: int, dim: int = 64) -> None:
        super().__init__()
        self.context, self.seq_len, self.dim = context, seq_len, dim
        self.embedding, self.head = nn.Embedding(256, dim), nn.Linear(dim, 256, bias=False)

    def configure_model(self) -> None:
        """Once the strategy has started the process group."""
        shape = (self.trainer.world_size // self.context, self.context)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "context"))
        self.cp = df.ContextParallel(self.mesh["context"])
        self.layers = nn.ModuleList(df.nn.SelfAttention(self.dim, heads=4, cp=self.cp) for _ in range(2))

    def train_dataloader(self) -> DataLoader:
        """The same sequences on the ranks that share them, which Lightning's own sampler would not give."""
        data = torch.randint(256, (64, self.seq_len + 1), generator=torch.Generator().manual_seed(0))
        sampler = DistributedSampler(data, self.mesh["data"].size(), self.mesh.get_local_rank("data"))
        return DataLoader(data, batch_size=4 // self.mesh["data"].size(), sampler=sampler)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        """The mean loss of all ranks' tokens, of which DDP's average of gradients is the gradient."""
        tokens, labels = self.cp.shard(batch[:, :-1]), self.cp.shard(batch[:, 1:])  # shifted first, sharded second
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x, seq_len=self.seq_len)
        loss_sum = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")
        loss = self.cp.mean(loss_sum, labels.numel(), reduction="mean", group=dist.group.WORLD)
        self.log("loss", loss)
        self.print(f"step {self.global_step}: loss {loss.item():.7f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(context: int | None, steps: int) -> None:
    """As a rank that torchrun has started. context: by default all ranks."""
    trainer = lightning.Trainer(
        strategy="ddp", devices=int(os.environ["LOCAL_WORLD_SIZE"]), max_steps=steps, use_distributed_sampler=False,
        gradient_clip_val=1.0, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    lightning.seed_everything(0)  # the same weights on every rank
    trainer.fit(Decoder(context or trainer.world_size, seq_len=257))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, help="ranks that share a sequence; by default all")
    parser.add_argument("--steps", type=int, default=10)
    train(**vars(parser.parse_args()))
    dist.destroy_process_group()
