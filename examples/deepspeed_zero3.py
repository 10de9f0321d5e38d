"""Train with DeepSpeed ZeRO-3 over all ranks, each sequence spread over two of them.

    torchrun --nproc-per-node 4 examples/deepspeed_zero3.py    # data 2 x context 2

A tiny model that learns to count, on CPUs where there are no GPUs.
"""

import os

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import distflash as df
import distflash.integrations.deepspeed as dfd

CONFIG = {
    "train_batch_size": 4,  # sequences, however many ranks hold each of them
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,  # SGD
    "gradient_clipping": 0.0,  # left out, DeepSpeed clips at 1.0
}


class Decoder(nn.Module):
    """Tokens [batch, tokens of this rank] to logits."""

    def __init__(self, cp, vocabulary=256, dim=64, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        # RoPE by positions in the whole sequence is inside.
        self.layers = nn.ModuleList(
            df.nn.SelfAttention(dim, heads=4, kv_heads=2, cp=cp) for _ in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens, seq_len):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(self.norm(x), seq_len=seq_len)
        return self.head(self.norm(x))


on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
else:  # an all-reduce that DeepSpeed would compile for 20 seconds
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
topology = dfd.Topology(context=min(2, dist.get_world_size()))

torch.manual_seed(0)  # the same weights, and the same batches, on every rank
model = Decoder(topology.cp)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
engine, *_ = dfd.initialize(topology, model=model, config=CONFIG, optimizer=optimizer)
shard = dfd.ShardBatch(topology.cp, seq_len=257)
for step in range(10):
    text = (torch.randint(256, (4, 1)) + torch.arange(257)).to(engine.device) % 256
    text = text[topology.data_rank :: topology.data]  # this data rank's sequences
    # Labels are shifted in whole sequences. Then this rank takes its tokens.
    tokens, labels = shard((text, dfd.shift_labels(text)))
    logits = engine(tokens, seq_len=257)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    # The mean over all ranks' labels; its gradient is the average that ZeRO makes.
    loss = topology.mean(total, (labels != -100).sum())
    engine.backward(loss)
    engine.step()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.6f}")
dist.destroy_process_group()
