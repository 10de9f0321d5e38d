"""Compile the layers with torch.compile: attention over all ranks is one op of a graph.

    torchrun --nproc-per-node 2 examples/compile.py

Sequences have another length in every step, and share a graph. On CPUs the default
backend needs a C++ compiler; --backend aot_eager needs none.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import distflash as df


class Block(nn.Module):
    """A decoder layer; x is [batch, tokens of this rank, dim]."""

    def __init__(self, cp, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        # RoPE is inside. In a layer of your own take positions from
        # cp.positions_of(x, seq_len), by which a graph serves all lengths.
        self.attention = df.nn.SelfAttention(dim, heads=4, kv_heads=2, cp=cp)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, seq_len):
        x = x + self.attention(self.norm1(x), seq_len=seq_len)
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Tokens [batch, tokens of this rank] to logits."""

    def __init__(self, cp, vocabulary=256, dim=64, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(cp, dim) for _ in range(layers))
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens, seq_len):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, seq_len)
        return self.head(x)


parser = argparse.ArgumentParser()
parser.add_argument("--backend", default="inductor", help="of torch.compile")
backend = parser.parse_args().backend
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = dist.init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
cp = df.ContextParallel(mesh)

torch.manual_seed(0)  # the same weights, and the same whole sequences, on every rank
decoder = Decoder(cp).to(device)
for block in decoder.blocks:
    block.compile(fullgraph=True, backend=backend)  # before DDP or fully_shard
model = nn.parallel.DistributedDataParallel(decoder)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(6):
    S = 257 + 11 * step
    text = (torch.randint(256, (2, 1)) + torch.arange(S + 1)).to(device) % 256
    tokens, labels = cp.shard(text[:, :-1]), cp.shard(text[:, 1:])  # shift, then shard
    logits = model(tokens, S)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = cp.mean(total, labels.numel(), reduction="mean")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if cp.rank == 0:
        print(f"step {step}, {S} tokens: loss {loss.item():.6f}")
dist.destroy_process_group()
