"""Peers that need real ranks give the results of one process."""

import torch
import torch.distributed as dist

import distflash as df
from benchmarks import common
from benchmarks.comparison import ours
from benchmarks.peers import all_to_all

S = 32


def on_rank():
    """Runs as a rank: results of the peer, and of ours in contiguous shards."""
    shape = common.Shape(1, S, 4, 2, 16, 16)
    cp = df.ContextParallel(dist.group.WORLD, layout=df.Contiguous())
    inputs = common.random_inputs(shape, cp.seq_local(S), torch.float64, torch.device("cpu"))
    peers = [all_to_all.all_to_all(), ours(cp, S)]
    results = [peer.run(inputs, mask).results for mask in (df.Causal(), df.Full()) for peer in peers]
    return [{name: x.detach() for name, x in result.items()} for result in results]


def test_all_to_all_is_attention(ranks_of):
    for causal, expected_causal, full, expected_full in ranks_of(2).run(on_rank):
        for got, expected in ((causal, expected_causal), (full, expected_full)):
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, msg=name)
        assert not torch.allclose(causal["out"], full["out"])
