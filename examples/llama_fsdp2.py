"""Train a Llama of your own with FSDP2 over all ranks, sequences spread over two.

torchrun --nproc-per-node 4 examples/llama_fsdp2.py    # data 2 x context 2
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import distflash as df


class Block(nn.Module):
    """A layer of Llama; x is [batch, tokens of this rank, dim]."""

    def __init__(self, cp, dim, heads=4, kv_heads=2, ffn=128):
        super().__init__()
        self.cp, self.split = cp, (heads, kv_heads, kv_heads)
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, sum(self.split) * (dim // heads), bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, dim, bias=False)
        self.rope = df.nn.RotaryEmbedding(dim // heads)

    def forward(self, x, seq_len):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (sum(self.split), -1))
        q, k, v = qkv.split(self.split, dim=2)
        q, k = self.rope(q, k, self.cp.positions(seq_len))  # in the whole sequence
        out = df.attention(q, k, v, mask=df.Causal(), cp=self.cp, seq_len=seq_len)
        x = x + self.out(out.flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """Tokens [batch, tokens of this rank] to logits."""

    def __init__(self, cp, vocabulary=256, dim=64, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(cp, dim) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens, seq_len):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, seq_len)
        return self.head(self.norm(x))


device = "cuda" if torch.cuda.is_available() else "cpu"
world = int(os.environ["WORLD_SIZE"])
shape = (world // min(2, world), min(2, world))
mesh = dist.init_device_mesh(device, shape, mesh_dim_names=("data", "context"))
cp = df.ContextParallel(mesh["context"])  # these ranks hold one sequence together
torch.manual_seed(0)  # the same weights, and the same batches, on every rank
model = Llama(cp).to(device)
for part in (*model.blocks, model):
    fully_shard(part)  # over all ranks
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
for step in range(10):
    text = (torch.randint(256, (4, 1)) + torch.arange(258)).to(device) % 256
    text = text[mesh.get_local_rank("data") :: shape[0]]  # this data rank's sequences
    tokens, labels = cp.shard(text[:, :-1]), cp.shard(text[:, 1:])  # shift, then shard
    logits = model(tokens, seq_len=257)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    # The mean over all ranks' tokens; its gradient is the average that FSDP2 makes.
    loss = cp.mean(total, labels.numel(), reduction="mean", group=dist.group.WORLD)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.6f}")
dist.destroy_process_group()
