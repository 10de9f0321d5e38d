"""The least: attention over a sequence that all ranks hold together.

    torchrun --nproc-per-node 2 examples/minimal.py

One projection learns to repeat the token before, on CPUs where there are no GPUs.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

import distflash as df

# This joins the processes that torchrun has started, and selects each one's GPU.
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = dist.init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))

# These ranks hold one sequence together.
cp = df.ContextParallel(mesh)

# The same seed: the same weights and the same whole sequence on every rank.
# 128 features become 8 query heads, 2 key heads and 2 value heads of 16 each.
# DDP averages gradients over the ranks.
torch.manual_seed(0)
project = nn.Linear(128, (8 + 2 + 2) * 16).to(device)
project = nn.parallel.DistributedDataParallel(project)
optimizer = torch.optim.SGD(project.parameters(), lr=5.0)
S = 1001  # total tokens; need not be divisible by the number of ranks
sequence = torch.randn(1, S + 1, 128).to(device)

# Shift in the whole sequence first, then take this rank's tokens.
x, target = cp.shard(sequence[:, 1:]), cp.shard(sequence[:, :-1])

for step in range(10):
    q, k, v = project(x).unflatten(-1, (8 + 2 + 2, 16)).split((8, 2, 2), dim=2)
    out = df.attention(q, k, v, mask=df.Causal(), cp=cp, seq_len=S)
    error = (out.flatten(2) - target).square().sum()
    # The mean over all ranks' tokens; its gradient is the average that DDP makes.
    loss = cp.mean(error, target.numel(), reduction="mean")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if cp.rank == 0:
        print(f"step {step}: loss {loss.item():.6f}")
dist.destroy_process_group()
