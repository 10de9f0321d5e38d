"""The kernel for Hopper GPUs (sm_90): warpgroup matrix instructions (WGMMA) fed by TMA, written in Gluon.

Importable without triton, which is imported when the kernel is first used.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor

from distflash.kernels.base import Abilities, BackwardContext, Kernel, KeyGradient, Keys, Problem, QueryGradient, Scores
from distflash.kernels.decoding import Decoding
from distflash.kernels.hopper.sums import query_sums, semaphores
from distflash.kernels.hopper.tiles import (
    KEYS,
    ORDERED,
    QUERIES,
    BackwardTile,
    ForwardTile,
    backward_tile,
    forward_tile,
    padded,
)
from distflash.kernels.launch import Launch
from distflash.kernels.machine import Machine, machine_of
from distflash.kernels.replay import Replays, facts_of, of_dropout, of_keys, of_state
from distflash.kernels.triton import Triton
from distflash.kernels.versions import gluon_reasons
from distflash.partial import Partial
from distflash.plan import Gradients, Pass
from distflash.turns import Turns, turns_of

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257, 8)
ROUNDS = 3  # work tiles per program: with fewer, programs finish at different times if masks make tiles unequal

_forward, _backward, _rounding = Replays(), Replays(), Replays()


@dataclass(frozen=True)
class Hopper(Kernel):
    """Exact attention in Gluon for sm_90, by row and column intervals; see `distflash.kernels.base.Kernel`.

    Forward and backward after FlashAttention-3 (https://arxiv.org/abs/2407.08608). dQ is accumulated in float32 in
    global memory, in the order in which tiles finish, so its last bits differ from run to run. For values of up to 64
    columns with wider keys, the backward pass is the portable kernel's.

    Args:
        deterministic: the same bits in every run. For head dims above 64 and up to 128, blocks of keys add to dQ in
            ascending order: each waits for the block before it. For others the backward pass is the portable kernel's,
            which computes seven products per tile instead of five, and has no order to keep.
        margin: the number of multiprocessors (SMs) that the persistent grid leaves free for communication kernels.
        forward_tile, backward_tile: tile sizes in place of the shipped ones, for tuning.
        machine: see `Kernel.rehearsing`.

    Raises:
        ValueError: margin is no int of at least 0, or a tile by columns is to be deterministic.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, kernel=df.kernels.Hopper(deterministic=True))
        >>> df.attention(*torch.randn(3, 1, 10, 4, 64), cp=cp)
        Traceback (most recent call last):
            ...
        ValueError: kernel: Hopper(...) does not support this call: Triton kernels run on GPUs, not on cpu; ...
    """

    base: ClassVar[float] = 2.0

    deterministic: bool = False
    margin: int = 0
    forward_tile: ForwardTile | None = None
    backward_tile: BackwardTile | None = None
    machine: Machine | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.margin, int) or isinstance(self.margin, bool) or self.margin < 0:
            raise ValueError(f"Hopper(margin): expected a number of multiprocessors, at least 0, got {self.margin!r}")
        if self.deterministic and self.backward_tile is not None and self.backward_tile.by_columns:
            raise ValueError(
                f"Hopper(backward_tile): with deterministic=True expected a tile that is not by_columns, whose dQ has "
                f"no order, got {self.backward_tile}; leave one of the two out"
            )

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = self._portable.not_supported_reasons(problem)
        if not reasons and self._machine(problem.device).arch != 90:
            reasons.append("the Hopper kernel needs a GPU of compute capability 9.0 (H100, H200)")
        elif not reasons and self._programs(problem.device) < 1:
            reasons.append(f"margin={self.margin} leaves the Hopper kernel no multiprocessor")
        elif not reasons:
            import triton

            reasons += gluon_reasons(triton.__version__)
        if problem.dtype not in DTYPES:
            reasons.append(f"the Hopper kernel takes float16 and bfloat16, not {problem.dtype}")
        if padded(problem.d_v) > padded(problem.d_qk):  # O is staged through Q's shared memory
            reasons.append(
                f"the Hopper kernel takes values as wide as keys at most, padded to a power of two, not d_v = "
                f"{problem.d_v} beside d_qk = {problem.d_qk}"
            )
        if problem.alibi:
            reasons.append("the Hopper kernel has no ALiBi")
        return reasons

    def abilities(self, device: torch.device) -> Abilities:
        if self.deterministic:
            return Abilities(two_sources=True, ordered_blocks=(KEYS, QUERIES))
        return Abilities(two_sources=True, some_heads=True, smallest_work=ROUNDS * KEYS * self._programs(device))

    def rehearsing(self, machine: Machine) -> Hopper | None:
        if self._portable.rehearsing(machine) is None:
            return None
        from distflash.kernels.hopper import launches  # noqa: F401  for processes that are forked from this one

        return replace(self, machine=machine)

    def decoding(self, device: torch.device) -> Decoding:
        """The portable kernel's: decoding is bound by memory bandwidth, so it needs no Hopper instructions."""
        return self._portable.decoding(device)

    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        seen = each.pairs / (q.shape[1] if each.live is None else max(1, each.live.count))
        dims = q.shape[-1], keys[0].v.shape[-1]
        tile = self.forward_tile or forward_tile(*dims, seen, scores.dropout is not None)

        def build() -> Launch:
            from distflash.kernels.hopper import launches

            return launches.forward(tile, self._programs(q.device), q, keys, each, scores, into)

        of_sources = of_keys(keys)
        tensors = [q, *of_sources, scores.sinks, *of_state(into), None if each.live is None else each.live.groups]
        inputs = facts_of(q, *of_sources[::4], *of_sources[1::4], scores.sinks)
        key: tuple[Hashable, ...] = (self.identity, tile, each.facts, scores.facts, inputs, into.maxima is None)
        if scores.dropout is not None:
            tensors += of_dropout(scores.dropout, keys)
            key += tuple([x.rows.in_tiles for x in keys])
        _forward.run(key, tensors, build)

    def preprocess(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> BackwardContext:
        if not _is_fused(q.shape[-1], out.shape[-1], self.deterministic):
            return self._portable.preprocess(q, out, lse, dout, dlse)
        saved = self._portable.preprocess(q, out, lse, dout, dlse, *query_sums(q))
        return replace(saved, semaphores=semaphores(q)) if self.deterministic else saved

    def backward(
        self, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        # dQ of few queries in order, or dQ, dK and dV for one of them: the portable kernel's two are faster.
        only = each.gradients is Gradients.OF_QUERIES and each.first and each.last
        separate = each.gradients is Gradients.OF_KEYS or only
        if saved.dq_accum is None or (self.deterministic and separate):
            self._portable.backward(saved, keys, each, scores, dq, dkv)
            return
        sums = saved.dq_accum
        if each.first:
            sums.zero_()  # with the counter
        turns = None
        if saved.semaphores is not None:
            # A pass of a plan that was not made for this kernel has none. These are of this call alone: tensors that
            # outlive it may lie in the memory of a CUDA graph.
            turns = each.turns or turns_of(keys.rows, KEYS, QUERIES)
            saved.semaphores.copy_(turns.ended)  # of every head
        if each.heads is None and self._few(saved.q, keys.k):
            self._backward_spread(saved, keys, scores, dkv, turns)
        else:
            self._backward(saved, keys, scores, dkv, each.heads or range(keys.k.shape[2]), turns)
        if each.last:
            tensors = [sums, dq.final]
            facts = scores.facts, facts_of(dq.final)
            _rounding.run(facts, tensors, lambda: _round_queries(sums, scores, dq.final))

    def _few(self, q: Tensor, k: Tensor) -> bool:
        """Whether work tiles (key blocks x key heads) are so few that three of four multiprocessors would idle."""
        (B, K, G, _), (_, T, H, _) = k.shape, q.shape
        # With few queries, copying and adding take the host longer than they save.
        return H > G and T >= 4 * K and self._programs(k.device) >= 4 * B * G * -(-K // KEYS)

    def _backward_spread(
        self, saved: BackwardContext, keys: Keys, scores: Scores, dkv: KeyGradient, turns: Turns | None
    ) -> None:
        """`_backward` with a copy of the keys for each query head, which makes more work tiles.

        The copies' gradients are added in float32. For few keys that many queries see, such as attention sinks.
        """
        heads = saved.q.shape[2]
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (keys.k, keys.v))
        each = KeyGradient(*(torch.empty_like(x, dtype=torch.float32) for x in (k, v)))
        self._backward(saved, Keys(k, v, keys.rows), scores, each, range(heads), turns)
        for total, parts in ((dkv.dk, each.dk), (dkv.dv, each.dv)):
            total.copy_(parts.unflatten(2, (total.shape[2], -1)).sum(3))

    def _backward(
        self,
        saved: BackwardContext,
        keys: Keys,
        scores: Scores,
        dkv: KeyGradient,
        heads: range,
        turns: Turns | None,
    ) -> None:
        # The kernel skips blocks of keys that no query sees.
        for unseen in keys.rows.unseen:
            for gradient in (dkv.dk, dkv.dv):
                gradient[:, unseen.start : unseen.stop, heads.start : heads.stop].zero_()

        rows, earlier = keys.rows, None if turns is None else turns.earlier

        def build() -> Launch:
            from distflash.kernels.hopper import launches

            tile = self._backward_tile(keys.k.shape[-1], keys.v.shape[-1])
            return launches.backward(tile, self._programs(saved.q.device), saved, keys, scores, dkv, heads, earlier)

        of_queries = saved.q, saved.dout, saved.lse_delta, saved.dq_accum, saved.counter
        tensors = [*of_queries, keys.k, keys.v, rows.col_lo, rows.col_hi, dkv.dk, dkv.dv, saved.semaphores, earlier]
        inputs = facts_of(saved.q, saved.dout, keys.k, keys.v, dkv.dk)
        key: tuple[Hashable, ...] = (self.identity, heads, scores.facts, inputs)
        if scores.dropout is not None:
            tensors += of_dropout(scores.dropout, (keys,))
            key += (rows.in_tiles,)
        _backward.run(key, tensors, build)

    def _backward_tile(self, d_qk: int, d_v: int) -> BackwardTile:
        tile = self.backward_tile or backward_tile(d_qk, d_v, self.deterministic)
        return replace(tile, direct=tile.direct and not self.deterministic, ordered=self.deterministic)

    def _programs(self, device: torch.device) -> int:
        return self._machine(device).multiprocessors - self.margin

    def _machine(self, device: torch.device) -> Machine:
        return self.machine or machine_of(device)

    @cached_property
    def _portable(self) -> Triton:
        return Triton(machine=self.machine)


@cache
def _is_fused(d_qk: int, d_v: int, deterministic: bool) -> bool:
    """Whether one kernel computes dQ, dK and dV for these head dims."""
    d_qk, d_v = padded(d_qk), padded(d_v)
    if deterministic:
        return d_qk == d_v and d_qk in ORDERED
    return d_qk == d_v or (d_qk, d_v) == (256, 128)


def _round_queries(sums: Tensor, scores: Scores, out: Tensor) -> Launch:
    from distflash.kernels.hopper import launches

    scale = scores.scale if scores.dropout is None else scores.scale * scores.dropout.keep_scale
    return launches.round_queries(sums, scale, out)
