"""A mask per sequence, and chunks of queries, over real processes, against dense float64."""

import pytest
import torch
import torch.distributed as dist

import distflash as df
from distflash.kernels import Reference
from tests.dense import Problem, assert_exact, assert_no_less_exact, in_dtype, join, make_inputs, on_rank
from tests.poison import poison_memory

UNION = df.Causal() & (df.Window(4) | df.FirstTokens(3))
ROWS = df.Rows([UNION, df.Causal() & df.Documents([0, 7, 8, 33, 47])])
PROBLEMS = {
    "rows": Problem(ROWS, 47, batch=2, heads=4, kv_heads=2, alibi=True),
    "rows that see nothing of other ranks": Problem(df.Rows([df.Window(0)] * 3), 47, batch=3, sinks=True),
    "a chunk": Problem(df.Causal(), 47, batch=2, heads=4, kv_heads=2, alibi=True, q_start=20, q_len=11),
    "a chunk under a union": Problem(UNION, 47, q_start=5, q_len=40, kv_layout=df.Striped()),
    "a chunk of rows": Problem(ROWS, 47, batch=2, sinks=True, q_start=30, q_len=17, kv_layout=df.Contiguous()),
    "fewer queries than ranks": Problem(df.Causal(), 47, q_start=46, q_len=1, sinks=True),
    "no queries": Problem(df.Causal(), 47, q_start=40, q_len=0),
    "cross-attention": Problem(df.Full(), 20, batch=2, heads=3, alibi=True, q_len=51, kv_layout=df.Contiguous()),
    "cross-attention to no keys": Problem(df.Full(), 0, sinks=True, q_len=51),
}


def part(p, layout):
    """Runs as a rank: its part of a problem."""
    poison_memory()
    return on_rank(p, make_inputs(p), df.ContextParallel(dist.group.WORLD, layout, kernel=Reference()))


def joined(parts, p, layout):
    return join(parts, layout, p.queries, p.kv_layout, p.seq_len)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
@pytest.mark.parametrize("world_size", [2, 3])
def test_exact(world_size, layout, name, ranks_of):
    """In float64 to its rounding; in bfloat16 no less exact than one rank."""
    ranks, p = ranks_of(world_size), PROBLEMS[name]
    assert_exact(p, make_inputs(p), joined(ranks.run(part, p, layout), p, layout))
    p = in_dtype(p, torch.bfloat16)
    alone = on_rank(p, make_inputs(p), df.ContextParallel(df.transport.Alone(), kernel=Reference()))
    assert_no_less_exact(p, make_inputs(p), joined(ranks.run(part, p, layout), p, layout), alone)


def moving(steps):
    """Runs as a rank: one compiled layer over chunks that move, and batches whose rows change; graphs and results."""
    cp, graphs = df.ContextParallel(dist.group.WORLD), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def layer(q, k, v, mask, q_start):
        return df.attention(q, k, v, mask=mask, cp=cp, seq_len=24, q_start=q_start, q_len=6)

    fast = torch.compile(layer, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    q, k = (torch.randn(2, tokens, 2, 8, dtype=torch.float64) for tokens in (6, 24))
    q, k = cp.shard(q), cp.shard(k)
    same = []
    for step in range(steps):
        mask = df.Causal() & df.Rows([df.Documents([0, 3 + step, 24]), df.Documents([0, 5, 9 + step, 24])])
        got, expected = (f(q, k, k, mask, 2 + step) for f in (fast, layer))
        same.append(torch.allclose(got, expected, rtol=1e-12, atol=1e-12))
    return len(graphs), same


def test_one_graph_serves_all_chunks_and_rows(ranks_of):
    for graphs, same in ranks_of(2).run(moving, 10):
        assert all(same) and graphs <= 2
