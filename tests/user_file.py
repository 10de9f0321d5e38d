"""What a user writes, for type checkers alone: `mypy` of the repository reads it, and pyright accepts it as well.

It is never run. Every `assert_type` is an error where the type of a public name gets lost.
"""

from dataclasses import dataclass
from typing import Any, assert_type

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import distflash as df
import distflash.integrations.deepspeed as dfd
import distflash.integrations.transformers as dft


class Attention(nn.Module):
    def __init__(self, cp: df.ContextParallel | None) -> None:
        super().__init__()
        self.cp = cp
        self.mask: df.Mask = df.Causal() & (df.Window(4095) | df.FirstTokens(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq_len: int) -> Tensor:
        return df.attention(q, k, v, mask=self.mask, cp=self.cp, seq_len=seq_len).flatten(2)


def groups() -> df.ContextParallel:
    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))
    df.ContextParallel(mesh["cp"], df.Striped(), df.AllGather(chunks=1), df.kernels.Triton())
    df.ContextParallel(mesh, schedule=df.DoubleRing(ranks_per_node=4), check_every_call=True)
    return df.ContextParallel(dist.group.WORLD, layout=df.Zigzag(), schedule=df.Ulysses(df.Ring()), timeout=60)


def train(q: Tensor, k: Tensor, v: Tensor, with_lse: bool, clips: bool) -> None:
    cp = groups()
    assert_type(cp.shard(q), Tensor)
    assert_type(cp.unshard(cp.shard(q, dim=1), dim=1), Tensor)
    assert_type(cp.positions(4096), Tensor)
    assert_type(cp.positions_of(q, seq_len=4096), Tensor)
    assert_type((cp.rank, cp.world_size, cp.seq_local(4096)), tuple[int, int, int])
    assert_type(df.attention(q, k, v), Tensor)
    assert_type(df.attention(q, k, v, mask=df.Documents([0, 4096]), cp=cp, softcap=30.0), Tensor)
    out, lse = df.attention(q, k, v, cp=cp, return_lse=True)
    assert_type((out, lse), tuple[Tensor, Tensor])
    assert_type(df.attention(q, k, v, return_lse=with_lse), Tensor | tuple[Tensor, Tensor])
    both = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
    assert_type(df.attention(q, k, v, return_max_logits=True), tuple[Tensor, Tensor])
    assert_type(df.attention(q, k, v, return_lse=True, return_max_logits=True), tuple[Tensor, Tensor, Tensor])
    assert_type(df.attention(q, k, v, return_lse=with_lse, return_max_logits=clips), both)
    assert_type(cp.mean(out.sum(), out.numel(), reduction="mean"), Tensor)
    assert_type(df.attention(q, k, v, cp=cp, scale=0.1, sinks=torch.zeros(8), alibi_slopes=torch.ones(8)), Tensor)
    assert_type(str(cp.plan(df.Causal(), seq_len=4096)), str)
    cp.warm_up(q.shape, k.shape, dtype=torch.bfloat16, mask=df.Causal())


def masks(cu_seqlens: Tensor, parents: list[int], lengths: list[int]) -> df.Mask:
    assert_type(df.Documents(cu_seqlens).seq_len, int)
    assert_type(df.Causal().materialize(torch.arange(4), torch.arange(4)), Tensor)
    mask = df.Causal() & df.Documents(cu_seqlens) & df.Chunked(1024) | df.PrefixLM(16)
    assert_type(mask, df.Mask)
    return df.Rows([mask, df.Causal() & df.BlockCausal([0, 4, 8]), df.Tree(parents, lengths), df.Full()])


@dataclass(frozen=True)
class Lookahead(df.Mask):
    n: int

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(positions), positions + 1 + self.n


def packed(cp: df.ContextParallel, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    mask = df.Causal() & df.Documents(cu_seqlens)
    of_batch = cp.with_mask(mask)
    assert_type(of_batch, df.ContextParallel)
    attend = df.nn.SelfAttention(256, heads=8, kv_heads=2, cp=cp)
    assert_type(attend.heads, int)
    return of_batch.shard(tokens)


def generate(cp: df.ContextParallel, q: Tensor, k: Tensor, v: Tensor) -> None:
    cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=64, capacity=4096)
    assert_type(df.attention(q, k, v, mask=df.Causal(), cp=cp, cache=cache), Tensor)
    assert_type(df.decode(q, k, v, cache=cache), Tensor)
    assert_type(df.decode(q, k, v, cache=cache, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cache.lengths, tuple[int, ...])
    cache.truncate(16)


def check(cp: df.ContextParallel, batch: Tensor) -> None:
    def step(batch: Tensor, cp: df.ContextParallel | None) -> Tensor:
        return batch.sum()

    report = df.verify(step, batch, cp)
    assert_type(report, df.Report)
    assert_type(report.ok, bool)
    try:
        step(batch, cp)
    except df.RankFailure as failure:
        assert_type(failure.failed, tuple[int, ...])


def in_transformers(cp: df.ContextParallel, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    dft.register(cp)
    part = dft.shard_batch(batch, cp)
    assert_type(part, dict[str, Any])
    assert_type(dft.shard_labels(batch["labels"], cp), Tensor)
    assert_type(dft.shard_position_ids(4096, cp), Tensor)
    return dft.Trainer(model=model, context_parallel=cp).train()


def in_deepspeed(loss_sum: Tensor, labels: Tensor) -> Tensor:
    topology = dfd.Topology(context=4, layout=df.Zigzag())
    assert_type(topology.cp, df.ContextParallel)
    inputs, labels = dfd.ShardBatch(topology.cp, 4096)((labels, labels))
    assert_type((inputs, labels), tuple[Tensor | tuple[Tensor, Tensor], Tensor])
    return topology.mean(loss_sum, labels.numel())


def simulate() -> list[int]:
    def work(transport: df.transport.Transport) -> int:
        return df.ContextParallel(transport).rank

    return df.transport.Simulator(4).run(work)
