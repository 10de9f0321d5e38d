"""Train with Lightning, each sequence spread over the ranks of a group.

torchrun --nproc-per-node 2 examples/lightning_module.py
torchrun --nproc-per-node 4 examples/lightning_module.py --context 2
"""

from __future__ import annotations

import argparse
import os

import lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import distflash as df


class Decoder(lightning.LightningModule):
    """Attention between an embedding and a head. context: ranks of a sequence."""

    def __init__(self, context: int, seq_len: int, dim: int = 64) -> None:
        super().__init__()
        self.context, self.seq_len, self.dim = context, seq_len, dim
        self.embedding, self.head = nn.Embedding(256, dim), nn.Linear(dim, 256)

    def configure_model(self) -> None:
        # The strategy has started the process group by now.
        shape = (self.trainer.world_size // self.context, self.context)
        names = ("data", "context")
        self.mesh = dist.init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.cp = df.ContextParallel(self.mesh["context"])
        self.attention = df.nn.SelfAttention(self.dim, heads=4, cp=self.cp)

    def train_dataloader(self) -> DataLoader:
        """The same sequences on the ranks of a group, unlike Lightning's sampler."""
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(256, (64, self.seq_len + 1), generator=generator)
        ranks = self.mesh["data"].size()
        sampler = DistributedSampler(data, ranks, self.mesh.get_local_rank("data"))
        return DataLoader(data, batch_size=4 // ranks, sampler=sampler)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        """The mean loss of all ranks' tokens, whose gradient is DDP's average."""
        tokens, labels = map(self.cp.shard, (batch[:, :-1], batch[:, 1:]))
        x = self.embedding(tokens)
        x = x + self.attention(x, seq_len=self.seq_len)
        logits = self.head(x).flatten(0, 1)
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        everyone, count = dist.group.WORLD, labels.numel()
        loss = self.cp.mean(total, count, reduction="mean", group=everyone)
        self.log("loss", loss)
        self.print(f"step {self.global_step}: loss {loss.item():.7f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def train(context: int | None, steps: int) -> None:
    """As a rank that torchrun has started. context: by default all ranks."""
    trainer = lightning.Trainer(
        strategy="ddp", devices=int(os.environ["LOCAL_WORLD_SIZE"]), max_steps=steps,
        accumulate_grad_batches=2, use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    lightning.seed_everything(0)  # the same weights on every rank
    trainer.fit(Decoder(context or trainer.world_size, seq_len=257))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, help="ranks of a sequence; default: all")
    train(parser.parse_args().context, steps=10)
    dist.destroy_process_group()
