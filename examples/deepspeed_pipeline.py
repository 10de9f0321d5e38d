"""Train a DeepSpeed pipeline of two stages, each sequence spread over ranks.

    torchrun --nproc-per-node 4 examples/deepspeed_pipeline.py    # pipe 2 x context 2

A tiny model that learns to count, on CPUs where there are no GPUs.
"""

import os

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from torch import nn

import distflash as df
import distflash.integrations.deepspeed as dfd

DIM, SEQ_LEN, BATCH = 64, 257, 4
CONFIG = {
    "train_batch_size": BATCH,  # sequences, however many ranks hold each of them
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,  # left out, DeepSpeed clips at 1.0
}


class Block(nn.Module):
    """A decoder layer; x is [batch, tokens of this rank, dim]."""

    def __init__(self, cp):
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        # RoPE by positions in the whole sequence is inside.
        self.attention = df.nn.SelfAttention(DIM, heads=4, kv_heads=2, cp=cp)

    def forward(self, x, *, mask, seq_len):
        return x + self.attention(self.norm(x), mask=mask, seq_len=seq_len)


def batches(step):
    """Micro-batches of tokens and labels, whole and the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    for start in torch.randint(256, (BATCH, 1, 1), generator=generator):
        tokens = (start + torch.arange(SEQ_LEN)) % 256
        yield tokens, dfd.shift_labels(tokens)


on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
else:  # an all-reduce that DeepSpeed would compile for 20 seconds
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
pipe = min(2, dist.get_world_size())
topology = dfd.Topology(pipe=pipe, context=dist.get_world_size() // pipe)
cp = topology.cp  # the ranks that hold one sequence together

layers = [
    LayerSpec(dfd.Embedding, 256, DIM),
    *[LayerSpec(dfd.DecoderBlock, Block, cp, cp=cp, seq_len=SEQ_LEN) for _ in range(2)],
    LayerSpec(dfd.TokenWise, nn.RMSNorm, DIM),
    LayerSpec(dfd.TokenWise, nn.Linear, DIM, 256),
]
options = {"seed_layers": True, "seed_fn": torch.manual_seed}  # a seed for each layer
loss_fn = dfd.CausalLoss(topology)  # the mean over all ranks' labels
model = dfd.pipeline_module(topology, layers, loss_fn=loss_fn, **options)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
engine, *_ = dfd.initialize(topology, model=model, config=CONFIG, optimizer=optimizer)
engine.set_batch_fn(dfd.ShardBatch(cp, SEQ_LEN))
for step in range(10):
    loss = engine.train_batch(batches(step))
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.6f}")
dist.destroy_process_group()
