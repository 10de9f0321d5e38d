"""The kernel for Hopper GPUs (sm_90): warpgroup matrix instructions fed by the tensor copy engine, written in Gluon.

Importable without triton, which is imported when the kernel is first asked for something.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distflash.intervals import Intervals
from distflash.kernels.base import Hop, KeyGradient, Keys, Problem, QueryGradient, Saved, Scores
from distflash.kernels.hopper.tiles import KEYS, BackwardTile, ForwardTile, backward_tile, forward_tile, padded
from distflash.kernels.triton import Triton
from distflash.partial import Partial

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257, 8)
ROUNDS = 3  # of blocks of keys: where masks make them unequal, with fewer some programs end long before others


@dataclass(frozen=True)
class Hopper:
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

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Intervals, scores: Scores, hop: Hop, into: Partial
    ) -> None:
        self._forward(q, Keys(k, v, rows), scores, hop, into)

    def forward_some(self, q: Tensor, own: Keys, scores: Scores, kv_heads: int, into: Partial) -> None:
        self._forward(q, own, scores, Hop(first=True, last=False), into, kv_heads)

    def forward_both(
        self, q: Tensor, own: Keys, other: Keys, scores: Scores, kv_heads: int, last: bool, into: Partial
    ) -> None:
        self._forward(q, own, scores, Hop(first=True, last=last), into, kv_heads, other)

    def _forward(
        self, q: Tensor, keys: Keys, scores: Scores, hop: Hop, into: Partial, kv_heads: int | None = None,
        other: Keys | None = None,
    ) -> None:  # fmt: skip
        from distflash.kernels.hopper import launches

        owners = [keys] if other is None else [keys, other]
        seen = sum(owner.rows.pairs for owner in owners) / q.shape[1]
        tile = self.forward_tile or forward_tile(q.shape[-1], keys.v.shape[-1], seen)
        with torch.cuda.device(q.device):
            programs = self._programs(q.device)
            launches.forward(tile, programs, q, keys, scores, hop, into, kv_heads, other).run()

    def save(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Saved:
        saved = Triton().save(q, out, lse, dout, dlse)
        if not self._fused(q, out):
            return saved
        from distflash.kernels.hopper import launches

        return replace(saved, counter=q.new_zeros(2, dtype=torch.int32), sums=launches.query_sums(saved.q))

    def backward(
        self,
        saved: Saved,
        k: Tensor,
        v: Tensor,
        rows: Intervals,
        scores: Scores,
        hop: Hop,
        dq: QueryGradient,
        dkv: KeyGradient,
        keys_done: Callable[[], None],
    ) -> None:
        keys = Keys(k, v, rows)
        if saved.sums is None:
            Triton().backward(saved, k, v, rows, scores, hop, dq, dkv, keys_done)
        elif self._few(saved.q, k):
            self._backward_spread(saved, keys, scores, hop, dq, dkv, keys_done)
        else:
            self._backward(saved, keys, scores, hop, dq, dkv, range(k.shape[2]), keys_done)

    def backward_some(
        self, saved: Saved, own: Keys, scores: Scores, heads: range, hop: Hop, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        self._backward(saved, own, scores, hop, dq, dkv, heads, lambda: None)

    def enough_keys(self, device: torch.device) -> int:
        return ROUNDS * KEYS * self._programs(device)

    def _few(self, q: Tensor, k: Tensor) -> bool:
        """Whether key heads are shared, and blocks of keys would leave three multiprocessors of four idle."""
        B, K, G, _ = k.shape
        return q.shape[2] > G and self._programs(k.device) >= 4 * B * G * -(-K // KEYS)

    def _backward_spread(
        self, saved: Saved, keys: Keys, scores: Scores, hop: Hop, dq: QueryGradient, dkv: KeyGradient,
        keys_done: Callable[[], None],
    ) -> None:  # fmt: skip
        """`_backward` with a copy of the keys for each query head: more work tiles, of fewer queries each.

        The copies' gradients are added in float32. For few keys that many queries see, such as the first of a sequence.
        """
        heads = saved.q.shape[2]
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (keys.k, keys.v))
        each = KeyGradient(*(torch.empty_like(x, dtype=torch.float32) for x in (k, v)))

        def add_up() -> None:
            for total, parts in ((dkv.dk, each.dk), (dkv.dv, each.dv)):
                total.copy_(parts.unflatten(2, (total.shape[2], -1)).sum(3))
            keys_done()

        self._backward(saved, Keys(k, v, keys.rows), scores, hop, dq, each, range(heads), add_up)

    def _backward(
        self, saved: Saved, keys: Keys, scores: Scores, hop: Hop, dq: QueryGradient, dkv: KeyGradient, heads: range,
        keys_done: Callable[[], None],
    ) -> None:  # fmt: skip
        from distflash.kernels.hopper import launches

        k, v = keys.k, keys.v
        assert saved.sums is not None
        tile = self.backward_tile or backward_tile(k.shape[-1], v.shape[-1])
        with torch.cuda.device(saved.q.device):
            if hop.first:
                saved.sums.zero_()
            # The kernel leaves out blocks of keys that no query sees.
            for unseen in keys.rows.unseen:
                for gradient in (dkv.dk, dkv.dv):
                    gradient[:, unseen.start : unseen.stop, heads.start : heads.stop].zero_()
            programs = self._programs(saved.q.device)
            launches.backward(tile, programs, saved, k, v, keys.rows, scores, dkv, heads).run()
            keys_done()
            if hop.last:
                launches.round_queries(saved.sums, scores.scale, dq.final).run()

    def _fused(self, q: Tensor, out: Tensor) -> bool:
        d_qk, d_v = padded(q.shape[-1]), padded(out.shape[-1])
        return not self.deterministic and (d_qk == d_v or (d_qk, d_v) == (256, 128))

    def _programs(self, device: torch.device) -> int:
        return _multiprocessors(device) - self.margin


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
