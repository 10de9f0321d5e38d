"""Ranges in the trace of `torch.profiler`, so that each kernel and message of a trace can be told to its ring step.

Their names begin with ``distflash::``. Where no profiler runs, `named` makes none, and the engine does not come here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from distflash.kernels.base import Abilities, BackwardContext, Kernel, KeyGradient, Keys, Problem, QueryGradient, Scores
from distflash.partial import Partial
from distflash.plan import Gradients, Pass, Stage
from distflash.transport import Message, Pending, PointToPoint
from distflash.transport.failures import ranks

P = ParamSpec("P")
R = TypeVar("R")

# A context that does nothing; it keeps no state, so one object is enough.
NOTHING: AbstractContextManager[object] = nullcontext()


def named(name: str) -> AbstractContextManager[object]:
    """A range ``distflash::name`` if a profiler runs, else nothing."""
    return record_function(f"distflash::{name}") if torch.autograd._profiler_enabled() else NOTHING


def within(name: str, work: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
    """``work(*arguments)`` in the range `named`. Without a profiler it costs less than a context that does nothing."""
    if torch.autograd._profiler_enabled():
        with named(name):
            return work(*arguments, **keywords)
    return work(*arguments, **keywords)


def with_profiler_ranges(
    kernel: Kernel, transport: PointToPoint, stages: Sequence[Stage], direction: str
) -> tuple[Kernel, PointToPoint]:
    """The same kernel and transport, with a range around each pass of ``stages``, each exchange and each wait."""
    names = {
        id(each): f"distflash::{direction} step {number}, {_words(each)}"
        for number, stage in enumerate(stages)
        for each in stage.passes
    }
    return RangedKernel(kernel, names), RangedPointToPoint(transport)


def _words(each: Pass) -> str:
    words = [f"keys of {ranks(each.sources)}"]
    if each.gradients is not Gradients.ALL:
        words.append(each.gradients.value)
    if each.heads is not None:
        words.append(f"key heads {each.heads.start} to {each.heads.stop - 1}")
    return ", ".join(words)


class RangedKernel(Kernel):
    """A kernel whose calls are ranges of a trace.

    Args:
        inner: the kernel.
        names: the range of each pass, by the `id` of the pass: equal passes of two stages are two objects.
    """

    def __init__(self, inner: Kernel, names: Mapping[int, str]) -> None:
        self.inner, self.names = inner, names
        self.base = inner.base  # type: ignore[misc]  # a constant of each kernel class, so of each object of this one

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return self.inner.not_supported_reasons(problem)

    def abilities(self, device: torch.device) -> Abilities:
        return self.inner.abilities(device)

    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        with record_function(self.names[id(each)]):
            self.inner.forward(q, keys, each, scores, into)

    def preprocess(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> BackwardContext:
        with record_function("distflash::backward preprocess"):
            return self.inner.preprocess(q, out, lse, dout, dlse)

    def backward(
        self, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        with record_function(self.names[id(each)]):
            self.inner.backward(saved, keys, each, scores, dq, dkv)


@dataclass(frozen=True)
class RangedPointToPoint:
    """A transport whose exchanges, and waits for them, are ranges of a trace."""

    inner: PointToPoint

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        what = " and ".join(dict.fromkeys(message.what for message in (*receives, *sends)))
        with record_function(f"distflash::start of sends and receives: {what}"):
            return RangedPending(self.inner.exchange(sends, receives), what)


@dataclass(frozen=True)
class RangedPending:
    """Messages in flight, with a profiler range for the wait."""

    inner: Pending
    what: str

    def wait(self) -> None:
        with record_function(f"distflash::wait for sends and receives: {self.what}"):
            self.inner.wait()
