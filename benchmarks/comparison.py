"""Compares attention implementations on one problem: each is run once and checked, then all are timed in turns.

Candidates that raise or give a wrong result are left out, with the reason.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import distflash as df
from benchmarks import common, reference
from distflash.kernels import Kernel, Problem

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
Attend = Callable[[Tensor, Tensor, Tensor, df.Mask], Tensor]
Result = TypeVar("Result")
# Floating-point operations of a candidate's pass on one device.
Work = Callable[[str, str], float]


@dataclass(frozen=True)
class Passes:
    """One candidate on its inputs: the calls to time, and its results."""

    calls: dict[str, Callable[[], object]]
    results: dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """An attention implementation.

    Attributes:
        attend: ``(q, k, v, mask) -> out``; raises ValueError for masks that it does not support.
        heads_first: whether its tensors are ``[B, H, S, D]``, else ``[B, S, H, D]``.
        repeat_heads: whether it needs as many key heads as query heads.
        before: called before each pass.
    """

    attend: Attend
    heads_first: bool = False
    repeat_heads: bool = False
    before: Callable[[], object] = lambda: None

    def run(self, inputs: tuple[Tensor, ...], mask: df.Mask) -> Passes:
        """Run forward and backward once on ``q, k, v, dout``, contiguous in the candidate's dimension order."""
        q, k, v, dout = self.native(inputs)
        group = self._group(inputs[0], inputs[1])

        def forward() -> Tensor:
            self.before()
            return self.attend(q, k, v, mask)

        def backward(out: Tensor, retain: bool = True) -> tuple[Tensor, ...]:
            self.before()
            return torch.autograd.grad(out, (q, k, v), dout, retain_graph=retain)

        out = forward()
        dq, dk, dv = map(self._turned, backward(out))
        calls = {
            FORWARD: forward,
            BACKWARD: lambda: backward(out),
            BOTH: lambda: backward(forward(), retain=False),
        }
        results = {"out": self._turned(out), "dq": dq, "dk": _folded(dk, group), "dv": _folded(dv, group)}
        return Passes(calls, results)

    def native(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``q, k, v, dout`` in the candidate's dimension order; the first three require gradients."""
        q, k, v, dout = (self._turned(x).detach().contiguous() for x in inputs)
        group, heads = self._group(inputs[0], inputs[1]), 1 if self.heads_first else 2
        k, v = (x.repeat_interleave(group, heads) if group > 1 else x for x in (k, v))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    def on_tokens(self, mask: df.Mask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The candidate's attention on ``[B, S, heads, D]``, for layers of a model."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.before()
            if (group := self._group(q, k)) > 1:
                k, v = (x.repeat_interleave(group, 2) for x in (k, v))
            return self._turned(self.attend(*map(self._turned, (q, k, v)), mask))

        return attend

    def _group(self, q: Tensor, k: Tensor) -> int:
        """How often keys ``[B, S, heads, D]`` are repeated."""
        return q.shape[2] // k.shape[2] if self.repeat_heads else 1

    def _turned(self, x: Tensor) -> Tensor:
        """From ``[B, S, heads, D]`` to the candidate's dimensions, or back."""
        return x.transpose(1, 2) if self.heads_first else x


def _folded(x: Tensor, group: int) -> Tensor:
    """The sum over groups of consecutive heads of ``[B, S, H, D]``."""
    return x if group == 1 else x.float().unflatten(2, (-1, group)).sum(3)


def ours(cp: df.ContextParallel, seq_len: int) -> Candidate:
    """distflash, on this rank's tokens."""
    return Candidate(lambda q, k, v, mask: df.attention(q, k, v, mask=mask, cp=cp, seq_len=seq_len))


def kernel_of(cp: df.ContextParallel, inputs: tuple[Tensor, ...]) -> Kernel:
    """The default kernel for these inputs."""
    q, k, v = inputs[:3]
    kernel = cp.calls.kernel_for(Problem(q.device, q.dtype, q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
    assert isinstance(kernel, Kernel), kernel
    return kernel


def reference_for(
    inputs: tuple[Tensor, ...],
    mask: df.Mask,
    cp: df.ContextParallel,
    seq_len: int,
    dropout: reference.Dropped = reference.NOTHING,
) -> reference.Reference:
    """The float64 reference at sampled tokens. It uses distflash's log-sum-exp, after checking it."""
    numbers = dict(dropout_p=dropout.p, dropout_seed=dropout.seed)
    with torch.no_grad():
        out, lse = df.attention(*inputs[:3], mask=mask, cp=cp, seq_len=seq_len, return_lse=True, **numbers)
    return reference.sample(*inputs, out, lse, mask=mask, cp=cp, seq_len=seq_len, dropout=dropout)


@dataclass
class Comparison:
    """Candidates by name, in the order in which they were added."""

    clock: common.Clock
    dtype: torch.dtype
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def enter(self, name: str, run: Callable[[], Passes], right: reference.Reference) -> bool:
        """Run and check a candidate. Returns False if it is left out. All ranks must call."""
        passes = self.attempt(name, run)
        return passes is not None and self.check(name, passes, right)

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """The result of ``work``; None, and ``name`` is left out, if it raises on any rank. All ranks must call."""
        result, reason = None, "failed on another rank"
        try:
            result = work()
        except Exception as error:
            reason = error_line(error)
        if common.worst(common.over_ranks(float(result is None), self.clock.device)) > 0:
            self.left_out[name] = reason
            return None
        return result

    def check(self, name: str, passes: Passes, right: reference.Reference) -> bool:
        """Add a candidate if its results are right on every rank."""
        errors = right.errors(**passes.results).items()
        self.errors[name] = {n: common.worst(common.over_ranks(error, self.clock.device)) for n, error in errors}
        if reference.wrong(self.errors[name], self.dtype):
            self.left_out[name] = "wrong result"
            return False
        self.calls |= {f"{name}|{which}": passes.calls[which] for which in self.passes}
        return True

    def row(self, work: Work) -> dict[str, Any]:
        """Time all candidates. TFLOP/s are of the slowest device; its work is ``work(name, pass)``."""
        timings = self.clock.medians(self.calls)
        ranks = {key: common.over_ranks(t.seconds, self.clock.device) for key, t in timings.items()}
        return {
            "errors": self.errors,
            "left_out": self.left_out,
            "timings": {key: asdict(t) for key, t in timings.items()},
            "ranks": ranks,
            "tflops": {key: work(*key.split("|")) / max(times) / 1e12 for key, times in ranks.items()},
        }


def error_line(error: BaseException) -> str:
    """An exception's message in one line, with the place where it was raised."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0][:200]}{place}"
