"""The plain-torch kernel as one that takes the keys of two owners in one pass, as the Hopper kernel does."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from distflash.kernels import Reference
from distflash.kernels.base import Hop, Keys, Scores
from distflash.partial import Partial, Softmax


@dataclass(frozen=True)
class Pairing(Reference):
    """One owner after the other, by heads; ``taken`` lists what was asked for."""

    taken: list[str] = field(default_factory=list, compare=False)

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

    def _heads(self, q: Tensor, keys: Keys, scores: Scores, hop: Hop, into: Partial, kv_heads: slice) -> None:
        group = q.shape[2] // keys.k.shape[2]
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        of_heads = {
            name: None if x is None else x[heads]
            for name, x in (("sinks", scores.sinks), ("alibi_slopes", scores.alibi_slopes))
        }
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
        self.forward(q[:, :, heads], k, v, keys.rows, replace(scores, **of_heads), hop, part)
