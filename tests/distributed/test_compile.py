"""Compiled attention over real ranks: one graph for all lengths, and run-time errors for wrong shards."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import distflash as df

LENGTHS = (12, 17, 31, 40, 13)  # of which both ranks hold equally many tokens, or not


def outputs_of_all_lengths():
    """Runs as a rank: how many graphs, and for each length the compiled and the eager output and gradient."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    cp, counter = df.ContextParallel(dist.group.WORLD), CompileCounterWithBackend("aot_eager")
    module = df.nn.SelfAttention(16, heads=4, kv_heads=2, cp=cp).double()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    pairs = []
    for length in LENGTHS:
        x = cp.shard(torch.randn(1, length, 16, dtype=torch.float64))
        for function in (compiled, module):
            mine = x.clone().requires_grad_()
            out = function(mine, seq_len=length)
            pairs.append((out.detach(), *torch.autograd.grad(out.square().sum(), mine)))
    graphs = counter.frame_count
    with pytest.raises(ValueError, match="local tokens, but Zigzag"):
        compiled(cp.shard(torch.randn(1, 40, 16, dtype=torch.float64)), seq_len=60)
    return graphs, pairs[::2], pairs[1::2]


def test_lengths_share_a_graph(ranks_of):
    for graphs, compiled, eager in ranks_of(2).run(outputs_of_all_lengths):
        assert graphs == 2  # of the first length, and of any
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
