"""The specification of an attention call: everything except the values of its tensors, as one hashable value.

The ranks compare it, the kernel and the plan are chosen by it, and it is the key of the caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from distflash.exact import ByValue
from distflash.kernels import Problem
from distflash.layouts import Layout


@dataclass(frozen=True)
class CallTokens:
    """The queries and keys of a call: their positions and layouts.

    Attributes:
        seq_len: the global number of keys.
        q_start, q_len: the queries are at positions ``q_start`` to ``q_start + q_len``.
        kv_layout: the layout of the keys, if it is not that of the queries; otherwise None.
        layout: the layout of the queries, if it is not the group's but one for this batch; otherwise None.
    """

    seq_len: int
    q_start: int
    q_len: int
    kv_layout: Layout | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class Specification:
    """One attention call, on one rank.

    Attributes:
        problem: the kernel's part of the specification.
        batch: the batch size.
        tokens: the queries and keys.
        mask: over global positions.
        scale: as the caller passed it.
        needs_grad: whether a backward may follow.
    """

    problem: Problem
    batch: int
    tokens: CallTokens
    mask: ByValue
    scale: float | None
    needs_grad: bool

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.problem, self.batch, self.tokens, self.mask, self.scale, self.needs_grad))

    def fields(self) -> dict[str, object]:
        """What has to be equal on all ranks, by names for errors."""
        problem, tokens = self.problem, self.tokens
        return {
            "batch": self.batch,
            "heads": problem.heads,
            "kv_heads": problem.kv_heads,
            "head_dim": problem.d_qk,
            "value head_dim": problem.d_v,
            "dtype": problem.dtype,
            "device": problem.device.type,
            "seq_len": tokens.seq_len,
            "q_start": tokens.q_start,
            "q_len": tokens.q_len,
            "kv_layout": tokens.kv_layout,
            "mask": self.mask.value,
            "scale": self.scale,
            "softcap": problem.softcap,
            "sinks": problem.sinks,
            "alibi_slopes": problem.alibi,
            "dropout_p": problem.dropout_p,
            "needs a gradient": self.needs_grad,
            "return_max_logits": problem.max_logits,
        }
