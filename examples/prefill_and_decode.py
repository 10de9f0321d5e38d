"""Read a long prompt in chunks, then decode, with keys and values spread over ranks.

    torchrun --nproc-per-node 2 examples/prefill_and_decode.py

A tiny random model, on CPUs where there are no GPUs.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import distflash as df


class Attention(nn.Module):
    """Attention of one layer, with its cache: 8 query heads, 2 key and value heads."""

    def __init__(self, cp, dim, capacity):
        super().__init__()
        self.cp, self.rope = cp, df.nn.RotaryEmbedding(16)
        self.qkv, self.out = nn.Linear(dim, 12 * 16), nn.Linear(8 * 16, dim)
        self.cache = df.Cache(
            cp, batch=1, kv_heads=2, d_qk=16, capacity=capacity, dtype=torch.float32
        )

    def project(self, x, positions):
        q, k, v = self.qkv(x).unflatten(-1, (12, 16)).split((8, 2, 2), dim=2)
        return *self.rope(q, k, positions), v

    def prefill(self, x, chunk_len):
        """x: this rank's tokens of the next chunk of the prompt."""
        positions = self.cache.length + self.cp.positions(chunk_len)
        qkv = self.project(x, positions)
        out = df.attention(
            *qkv, mask=df.Causal(), cp=self.cp, cache=self.cache, seq_len=chunk_len
        )
        return self.out(out.flatten(2))

    def decode(self, x):
        """x: the next token, the same on every rank."""
        position = torch.tensor([self.cache.length], device=x.device)
        out = df.decode(*self.project(x, position), cache=self.cache, mask=df.Causal())
        return self.out(out.flatten(2))


device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = dist.init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
cp = df.ContextParallel(mesh)
torch.manual_seed(0)  # the same weights and the same prompt on every rank
prompt = torch.randint(256, (1, 1000)).to(device)
layers = nn.ModuleList(Attention(cp, 64, capacity=1100) for _ in range(2)).to(device)
embedding, head = nn.Embedding(256, 64).to(device), nn.Linear(64, 256).to(device)

with torch.inference_mode():
    # All tokens but the last, in chunks of 256, and the loss of the next token of each.
    inputs, targets = prompt[:, :-1].split(256, 1), prompt[:, 1:].split(256, 1)
    for tokens, labels in zip(inputs, targets, strict=True):
        x = embedding(cp.shard(tokens))
        for layer in layers:
            x = x + layer.prefill(x, chunk_len=tokens.shape[1])
        labels = cp.shard(labels).flatten()
        total = F.cross_entropy(head(x).flatten(0, 1), labels, reduction="sum")
        loss = cp.mean(total, labels.numel(), reduction="sum")
        if cp.rank == 0:
            print(f"{layers[0].cache.length} tokens of the prompt: loss {loss:.6f}")
    # Every rank has the same bits, and so takes the same most likely token.
    token = prompt[:, -1:]
    for _ in range(8):
        x = embedding(token)
        for layer in layers:
            x = x + layer.decode(x)
        scores, token = head(x[:, -1]).log_softmax(-1).max(-1, keepdim=True)
        if cp.rank == 0:
            print(f"token {token.item()}: loss {-scores.item():.6f}")
dist.destroy_process_group()
