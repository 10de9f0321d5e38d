"""What an attention call is, but for the values in its tensors: one value, read by all who ask.

The ranks compare it, it says which kernel and which plan a call takes, and it is the call's signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from distflash.exact import Exact
from distflash.kernels import Problem
from distflash.layouts import Layout


@dataclass(frozen=True)
class Tokens:
    """Which tokens a call is about.

    Attributes:
        seq_len: the global number of keys.
        q_start, q_len: the queries are at positions ``q_start`` to ``q_start + q_len``.
        kv_layout: how the keys are spread over ranks, where not as queries are; else None.
        layout: how queries are, where not by the group's layout but by one for this batch's mask; else None.
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
        problem: what it asks of a kernel.
        batch: the batch size.
        tokens: which queries and keys.
        mask: of global positions.
        scale: as the caller gave it.
        needs_grad: whether a backward may follow.
    """

    problem: Problem
    batch: int
    tokens: Tokens
    mask: Exact
    scale: float | None
    needs_grad: bool

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.problem, self.batch, self.tokens, self.mask, self.scale, self.needs_grad))

    def fields(self) -> dict[str, object]:
        """What all ranks must have alike, by names for errors."""
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
            "needs a gradient": self.needs_grad,
        }
