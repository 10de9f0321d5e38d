"""The kernel for Hopper GPUs (sm_90): warpgroup matrix instructions fed by the tensor copy engine, written in Gluon.

Importable without triton, which is imported when the kernel is first asked for something.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from distflash.kernels.base import Abilities, Kernel, KeyGradient, Keys, Problem, QueryGradient, Saved, Scores
from distflash.kernels.decoding import Decoding
from distflash.kernels.hopper.tiles import KEYS, BackwardTile, ForwardTile, backward_tile, forward_tile, padded
from distflash.kernels.triton import Triton
from distflash.partial import Partial
from distflash.plan import Pass

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257, 8)
ROUNDS = 3  # of blocks of keys: where masks make them unequal, with fewer some programs end long before others


@dataclass(frozen=True)
class Hopper(Kernel):
    """Exact attention in Gluon for sm_90, by row and column intervals; see `distflash.kernels.base.Kernel`.

    Forward and backward after FlashAttention-3 (https://arxiv.org/abs/2407.08608). dQ is added up in float32 in global
    memory, in the order in which blocks of keys come by, so its last bits differ from run to run. Where values are of
    64 columns or fewer beside wider keys, the backward pass is the portable kernel's.

    Args:
        deterministic: the same bits in every run: the portable kernel's backward pass, which computes seven products a
            tile instead of five.
        margin: multiprocessors left to communication, which a grid as large as the GPU would hold up.
        forward_tile, backward_tile: in place of the shipped ones, for tuning.

    Raises:
        ValueError: margin is no int of at least 0.
    """

    base: ClassVar[float] = 2.0

    deterministic: bool = False
    margin: int = 0
    forward_tile: ForwardTile | None = None
    backward_tile: BackwardTile | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.margin, int) or isinstance(self.margin, bool) or self.margin < 0:
            raise ValueError(f"Hopper(margin): expected a number of multiprocessors, at least 0, got {self.margin!r}")

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = Triton().not_supported_reasons(problem)
        if not reasons and torch.cuda.get_device_capability(problem.device) != (9, 0):
            reasons.append("the Hopper kernel needs a GPU of compute capability 9.0 (H100, H200)")
        elif not reasons and self._programs(problem.device) < 1:
            reasons.append(f"margin={self.margin} leaves the Hopper kernel no multiprocessor")
        if problem.dtype not in DTYPES:
            reasons.append(f"the Hopper kernel takes float16 and bfloat16, not {problem.dtype}")
        if padded(problem.d_v) > padded(problem.d_qk):  # outputs leave by the place of the queries
            reasons.append(
                f"the Hopper kernel takes values as wide as keys at most, padded to a power of two, not d_v = "
                f"{problem.d_v} beside d_qk = {problem.d_qk}"
            )
        if problem.alibi:
            reasons.append("the Hopper kernel has no ALiBi")
        return reasons

    def abilities(self, device: torch.device) -> Abilities:
        if self.deterministic:
            return Abilities(two_sources=True)
        return Abilities(two_sources=True, some_heads=True, enough_keys=ROUNDS * KEYS * self._programs(device))

    def decoding(self, device: torch.device) -> Decoding:
        """The portable kernel's: it is bound by memory, which needs nothing of Hopper's own."""
        return Triton().decoding(device)

    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        from distflash.kernels.hopper import launches

        seen = each.pairs / (q.shape[1] if each.live is None else max(1, each.live.count))
        tile = self.forward_tile or forward_tile(q.shape[-1], keys[0].v.shape[-1], seen)
        with torch.cuda.device(q.device):
            launches.forward(tile, self._programs(q.device), q, keys, each, scores, into).run()

    def save(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Saved:
        saved = Triton().save(q, out, lse, dout, dlse)
        if not self._fused(q, out):
            return saved
        from distflash.kernels.hopper import launches

        return replace(saved, counter=q.new_zeros(2, dtype=torch.int32), sums=launches.query_sums(saved.q))

    def backward(
        self, saved: Saved, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        if saved.sums is None:
            Triton().backward(saved, keys, each, scores, dq, dkv)
            return
        from distflash.kernels.hopper import launches

        with torch.cuda.device(saved.q.device):
            if each.first:
                saved.sums.zero_()
            if each.heads is None and self._few(saved.q, keys.k):
                self._backward_spread(saved, keys, scores, dkv)
            else:
                self._backward(saved, keys, scores, dkv, each.heads or range(keys.k.shape[2]))
            if each.last:
                launches.round_queries(saved.sums, scores.scale, dq.final).run()

    def _few(self, q: Tensor, k: Tensor) -> bool:
        """Whether key heads are shared, and blocks of keys would leave three multiprocessors of four idle."""
        B, K, G, _ = k.shape
        return q.shape[2] > G and self._programs(k.device) >= 4 * B * G * -(-K // KEYS)

    def _backward_spread(self, saved: Saved, keys: Keys, scores: Scores, dkv: KeyGradient) -> None:
        """`_backward` with a copy of the keys for each query head: more work tiles, of fewer queries each.

        The copies' gradients are added in float32. For few keys that many queries see, such as the first of a sequence.
        """
        heads = saved.q.shape[2]
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (keys.k, keys.v))
        each = KeyGradient(*(torch.empty_like(x, dtype=torch.float32) for x in (k, v)))
        self._backward(saved, Keys(k, v, keys.rows), scores, each, range(heads))
        for total, parts in ((dkv.dk, each.dk), (dkv.dv, each.dv)):
            total.copy_(parts.unflatten(2, (total.shape[2], -1)).sum(3))

    def _backward(self, saved: Saved, keys: Keys, scores: Scores, dkv: KeyGradient, heads: range) -> None:
        from distflash.kernels.hopper import launches

        tile = self.backward_tile or backward_tile(keys.k.shape[-1], keys.v.shape[-1])
        # The kernel leaves out blocks of keys that no query sees.
        for unseen in keys.rows.unseen:
            for gradient in (dkv.dk, dkv.dv):
                gradient[:, unseen.start : unseen.stop, heads.start : heads.stop].zero_()
        launches.backward(tile, self._programs(saved.q.device), saved, keys, scores, dkv, heads).run()

    def _fused(self, q: Tensor, out: Tensor) -> bool:
        d_qk, d_v = padded(q.shape[-1]), padded(out.shape[-1])
        return not self.deterministic and (d_qk == d_v or (d_qk, d_v) == (256, 128))

    def _programs(self, device: torch.device) -> int:
        return _multiprocessors(device) - self.margin


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
