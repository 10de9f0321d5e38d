"""The plain-torch kernel as one that takes the keys of two owners in one pass, and heads by themselves, as the Hopper
kernel does."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distflash.kernels import Reference
from distflash.kernels.base import Hop, KeyGradient, Keys, QueryGradient, Saved, Scores
from distflash.partial import Partial, Softmax, accumulator_dtype


@dataclass(frozen=True)
class Pairing(Reference):
    """One owner after the other, by heads; ``taken`` lists what was asked for."""

    taken: list[str] = field(default_factory=list, compare=False)
    enough: int = 0

    def forward_some(self, q: Tensor, own: Keys, scores: Scores, kv_heads: int, into: Partial) -> None:
        self.taken.append("some")
        self._heads(q, own, scores, Hop(first=True, last=False), into, slice(0, kv_heads))

    def forward_both(
        self, q: Tensor, own: Keys, other: Keys, scores: Scores, kv_heads: int, last: bool, into: Partial
    ) -> None:
        self.taken.append("both")
        waited = slice(kv_heads, own.k.shape[2])
        self._heads(q, own, scores, Hop(first=True, last=False), into, waited)
        for heads in (slice(0, kv_heads), waited):
            self._heads(q, other, scores, Hop(first=False, last=last), into, heads)

    def save(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Saved:
        saved = super().save(q, out, lse, dout, dlse)
        return replace(saved, sums=torch.empty_like(q, dtype=accumulator_dtype(q.dtype)))

    def backward(self, saved, k, v, rows, scores, hop, dq, dkv, keys_done):
        assert dq.sum is None
        super().backward(saved, k, v, rows, scores, hop, replace(dq, sum=saved.sums), dkv, keys_done)

    def backward_some(
        self, saved: Saved, own: Keys, scores: Scores, heads: range, hop: Hop, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        self.taken.append(f"backward {heads.start} to {heads.stop}")
        assert saved.sums is not None
        if hop.first:
            saved.sums.zero_()
        group = saved.q.shape[2] // own.k.shape[2]
        some, of_keys = slice(heads.start * group, heads.stop * group), slice(heads.start, heads.stop)
        part = Saved(saved.q[:, :, some], saved.dout[:, :, some], saved.lse[:, some], saved.delta[:, some])
        part_dq = QueryGradient(dq.final[:, :, some], saved.sums[:, :, some])
        part_dkv = KeyGradient(dkv.dk[:, :, of_keys], dkv.dv[:, :, of_keys])
        k, v = own.k[:, :, of_keys], own.v[:, :, of_keys]
        going_on = Hop(first=False, last=False)
        Reference.backward(
            self, part, k, v, own.rows, _of_heads(scores, some), going_on, part_dq, part_dkv, lambda: None
        )
        if hop.last:
            dq.final.copy_(saved.sums)

    def enough_keys(self, device: torch.device) -> int:
        return self.enough

    def _heads(self, q: Tensor, keys: Keys, scores: Scores, hop: Hop, into: Partial, kv_heads: slice) -> None:
        group = q.shape[2] // keys.k.shape[2]
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        assert into.running is not None
        part = Partial(
            final=into.final[:, :, heads],
            lse=into.lse[:, heads],
            running=Softmax(
                into.running.maximum[:, heads], into.running.total[:, heads], into.running.weighted[:, :, heads]
            ),
            counter=into.counter,
        )
        k, v = (x[:, :, kv_heads] for x in (keys.k, keys.v))
        self.forward(q[:, :, heads], k, v, keys.rows, _of_heads(scores, heads), hop, part)


def _of_heads(scores: Scores, heads: slice) -> Scores:
    sinks, slopes = (None if x is None else x[heads] for x in (scores.sinks, scores.alibi_slopes))
    return replace(scores, sinks=sinks, alibi_slopes=slopes)
