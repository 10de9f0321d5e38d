"""What a user writes, for type checkers alone: `mypy` of the repository reads it, and it is never run.

Every `assert_type` is an error where the type of a public name gets lost.
"""

from typing import assert_type

import torch.distributed as dist
from torch import Tensor, nn

import distflash as df


class Attention(nn.Module):
    def __init__(self, cp: df.ContextParallel | None) -> None:
        super().__init__()
        self.cp = cp
        self.mask: df.Mask = df.Causal() & (df.Window(4095) | df.FirstTokens(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq_len: int) -> Tensor:
        return df.attention(q, k, v, mask=self.mask, cp=self.cp, seq_len=seq_len).flatten(2)


def train(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> None:
    cp = df.ContextParallel(dist.group.WORLD, layout=df.Zigzag(), schedule=df.Ulysses(df.Ring()), timeout=60)
    assert_type(cp.shard(q), Tensor)
    assert_type(cp.positions(4096), Tensor)
    assert_type(df.attention(q, k, v), Tensor)
    assert_type(df.attention(q, k, v, mask=df.Documents([0, 4096]), cp=cp, softcap=30.0), Tensor)
    out, lse = df.attention(q, k, v, cp=cp, return_lse=True)
    assert_type((out, lse), tuple[Tensor, Tensor])
    assert_type(df.attention(q, k, v, return_lse=with_lse), Tensor | tuple[Tensor, Tensor])
    assert_type(cp.mean(out.sum(), out.numel(), reduction="mean"), Tensor)
    assert_type(df.nn.SelfAttention(256, heads=8, cp=cp).heads, int)


def generate(cp: df.ContextParallel, q: Tensor, k: Tensor, v: Tensor) -> None:
    cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=64, capacity=4096)
    assert_type(df.attention(q, k, v, mask=df.Causal(), cp=cp, cache=cache), Tensor)
    assert_type(df.decode(q, k, v, cache=cache), Tensor)
    assert_type(df.decode(q, k, v, cache=cache, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cache.lengths, tuple[int, ...])


def check(cp: df.ContextParallel, batch: Tensor) -> None:
    def step(batch: Tensor, cp: df.ContextParallel | None) -> Tensor:
        return batch.sum()

    report = df.verify(step, batch, cp)
    assert_type(report, df.Report)
    assert_type(report.ok, bool)
