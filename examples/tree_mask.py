"""A mask of your own: rollouts that share a prompt, which is there only once.

    torchrun --nproc-per-node 2 examples/tree_mask.py

`df.Tree` is such a mask for trees of any depth.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import distflash as df

PROMPT, LENGTH, ROLLOUTS = 100, 30, 8
S = PROMPT + LENGTH * ROLLOUTS


@dataclass(frozen=True)
class SharedPrompt(df.Mask):
    """A prompt, then rollouts of one length that see it and themselves, causally."""

    prompt: int
    length: int

    def parts(self, positions, seq_len):
        """The keys that queries at positions see: two intervals lo <= key < hi."""
        rollout = (positions - self.prompt).clamp(min=0) // self.length
        in_prompt = torch.zeros_like(positions), (positions + 1).clamp(max=self.prompt)
        in_rollout = self.prompt + rollout * self.length, positions + 1
        return in_prompt, in_rollout


class Decoder(nn.Module):
    """Embedding, attention, head. positions: of tokens [batch, local], for RoPE."""

    def __init__(self, cp):
        super().__init__()
        self.cp, self.rope = cp, df.nn.RotaryEmbedding(16)
        self.embedding, self.qkv = nn.Embedding(256, 64), nn.Linear(64, 12 * 16)
        self.head = nn.Linear(8 * 16, 256)

    def forward(self, tokens, positions, mask, seq_len):
        qkv = self.qkv(self.embedding(tokens)).unflatten(-1, (12, 16))
        q, k, v = qkv.split((8, 2, 2), dim=2)
        q, k = self.rope(q, k, positions)
        out = df.attention(q, k, v, mask=mask, cp=self.cp, seq_len=seq_len)
        return self.head(out.flatten(2))


device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = dist.init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
cp, mask = df.ContextParallel(mesh), SharedPrompt(PROMPT, LENGTH)
# Each rollout continues the prompt.
positions = torch.arange(S, device=device)
positions[PROMPT:] = PROMPT + (positions[PROMPT:] - PROMPT) % LENGTH

torch.manual_seed(0)  # the same weights, and the same whole sequences, on every rank
model = nn.parallel.DistributedDataParallel(Decoder(cp).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
for step in range(10):
    rollouts = torch.randint(256, (ROLLOUTS, 1)) + torch.arange(LENGTH)
    text = torch.cat([torch.randint(256, (PROMPT,)), rollouts.flatten() % 256])
    labels = text.roll(-1)
    labels[:PROMPT] = -100  # labels count within rollouts
    labels[PROMPT + LENGTH - 1 :: LENGTH] = -100
    tokens, labels = (cp.shard(x[None].to(device)) for x in (text, labels))
    logits = model(tokens, cp.shard(positions, dim=0), mask, S)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = cp.mean(total, (labels != -100).sum(), reduction="mean")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if cp.rank == 0:
        print(f"step {step}: loss {loss.item():.6f}")
dist.destroy_process_group()
