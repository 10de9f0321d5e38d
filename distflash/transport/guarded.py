"""A transport that reports failures to all ranks of its group.

An error of torch.distributed during a wait becomes a `RankFailure`, which says in which call the rank waited and for
what. Before it is raised, the rank writes its report to the group's store and closes the group's connections. That ends
the waits of the other ranks, which then read the report. A rank that raises an error of its own in the middle of a call
does the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor

from distflash.transport.base import Message, Transport
from distflash.transport.distributed import Distributed, InFlight
from distflash.transport.failures import FailureReport, FailureReports, RankFailure, ranks
from distflash.transport.watch import Watch

Direction = Literal["forward", "backward"]


_NOTHING: AbstractContextManager[None] = nullcontext()


def during(transport: Transport, direction: Direction, q: Tensor) -> AbstractContextManager[None]:
    """A context for the part of a call in which ranks wait for one another: it reports an error to the others."""
    return transport.during(direction, q.shape) if isinstance(transport, Guarded) else _NOTHING


def preparing(transport: Transport) -> AbstractContextManager[None]:
    """A context for the part of a call between the agreement and the first message: an error is reported to the others.

    A ValueError is not: it is about arguments that all ranks have, so all raise it and can continue.
    """
    return transport.preparing() if isinstance(transport, Guarded) else _NOTHING


@dataclass(frozen=True)
class _Call:
    number: int
    direction: Direction
    shape: torch.Size

    def __str__(self) -> str:
        return f"in call {self.number}, {self.direction} of q {tuple(self.shape)},"


@dataclass(frozen=True)
class _Part(AbstractContextManager[None]):
    """The context of a part of a call. A class, since a generator costs the host several times as much."""

    guarded: Guarded
    allowed: tuple[type[BaseException], ...]
    in_call: bool

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.guarded.leave(error, self.allowed)
        if self.in_call:
            self.guarded.leave_call()


class Guarded:
    """`Distributed` with failure reports. Everything else is delegated to it."""

    def __init__(self, inner: Distributed) -> None:
        self.inner = inner
        self.rank, self.world_size, self.device = inner.rank, inner.world_size, inner.device
        self.verifies_every_call, self.intra_node = inner.verifies_every_call, inner.intra_node
        self.supports_device = inner.supports_device
        self._reports = FailureReports(lambda: inner.store, inner.rank, inner.world_size)
        # Events cost the host some 10 us per exchange, and must not be queried while a CUDA graph is captured.
        self._watches = inner.device.type == "cuda" and inner.timeout is not None
        self._watch = Watch(self._is_stuck)
        self._calls = 0
        self._call: _Call | None = None
        self._in_call = _Part(self, (RankFailure,), in_call=True)
        self._in_preparation = _Part(self, (ValueError, RankFailure), in_call=False)
        self._giving_up = threading.Lock()
        # The message and the failed ranks. Not an exception, whose traceback would keep the call's tensors alive.
        self._failure: tuple[str, tuple[int, ...]] | None = None

    @property
    def members(self) -> tuple[int, ...]:
        """The global ranks of this group's ranks."""
        return self.inner.members

    def during(self, direction: Direction, shape: torch.Size) -> AbstractContextManager[None]:
        """See the function `during`."""
        self.require_sound()
        self._calls += 1
        self._call = _Call(self._calls, direction, shape)
        return self._in_call

    def preparing(self) -> AbstractContextManager[None]:
        """See the function `preparing`."""
        return self._in_preparation

    def leave(self, error: BaseException, allowed: tuple[type[BaseException], ...]) -> None:
        """Leave a part of a call by an error: report it to the other ranks, unless its type is allowed."""
        if not isinstance(error, allowed):
            self._tell(error)

    def leave_call(self) -> None:
        self._call = None

    def require_sound(self) -> None:
        """Raise `RankFailure` with the message of the first failure, if there was one."""
        if self._failure is not None:
            words, failed = self._failure
            raise RankFailure(
                f"this context-parallel group has failed before and its connections are closed; make a new process "
                f"group to go on. {words}",
                failed,
            )

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Exchange:
        self.require_sound()
        start = time.monotonic()
        try:
            works = self.inner.exchange(sends, receives)
        except RuntimeError as raw:
            self._stop(raw, _exchange_of((*receives, *sends)), start)
        return _Exchange(self, works)

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        with self._collective("all ranks to say what they were called with (agreement)"):
            return self.inner.gather_ints(values)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        with self._collective("the tensors of all ranks (all-gather)"):
            return self.inner.all_gather(x)

    def gather_equal(self, x: Tensor) -> Tensor:
        with self._collective("the partial results of all ranks (all-gather)"):
            return self.inner.gather_equal(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        with self._collective("the sum over all ranks (all-reduce)"):
            return self.inner.all_reduce(x)

    def wait(self, works: InFlight) -> None:
        """Wait for an exchange."""
        start = time.monotonic()
        try:
            works.wait()
        except RuntimeError as raw:
            self._stop(raw, works.describe(), start)
        if self._watches and works.works:
            self._queued(works.describe())
        self.require_sound()

    @contextmanager
    def _collective(self, what: str) -> Iterator[None]:
        self.require_sound()
        start, returned = time.monotonic(), threading.Event()
        if self._watches:
            self._watch.add(returned.is_set, self._waiting_for(what))
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._tell(error)
            raise
        except RuntimeError as raw:
            self._stop(raw, what, start)
        finally:
            returned.set()
        self._queued(what)
        self.require_sound()  # a wait that was ended by closing the group returns uninitialised memory

    def _queued(self, what: str) -> None:
        """Watch the work queued on the device so far. Takes a string, since a message would keep its tensor alive."""
        done = self.inner.mark() if self._watches else None
        if done is not None:
            self._watch.add(done, self._waiting_for(what))

    def _where(self) -> str:
        if self._call is not None:
            return f" {self._call}"
        return f" between calls {self._calls} and {self._calls + 1}," if self._calls else ""

    def _waiting_for(self, what: str) -> str:
        return f"{self._where()} for {what}"

    def _tell(self, error: BaseException) -> None:
        """Report an error of this rank to the others, which may wait for it."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self._give_up(FailureReport(self.rank, True, f"rank {self.rank} raised{self._where()} {reason}"))

    def _stop(self, raw: RuntimeError, what: str, start: float) -> NoReturn:
        """Report a failed wait to the others, which may wait for this rank, and raise."""
        self._give_up(self._waited(self._waiting_for(what), time.monotonic() - start, _cause(raw)))
        assert self._failure is not None
        raise RankFailure(*self._failure) from raw

    def _is_stuck(self, waiting_for: str, seconds: float) -> bool:
        """On GPUs: give up at the timeout, or if another rank has. Called by the watching thread."""
        limit = self.inner.timeout
        late = limit is not None and seconds >= limit.total_seconds()
        if late or self._reports.read() is not None:
            self._give_up(self._waited(waiting_for, seconds, "nothing came"))
        return self._failure is not None

    def _waited(self, waiting_for: str, seconds: float, cause: str) -> FailureReport:
        return FailureReport(self.rank, False, f"rank {self.rank} waited {seconds:.1f} s{waiting_for}: {cause}")

    def _give_up(self, report: FailureReport) -> None:
        with self._giving_up:
            if self._failure is not None:  # the watching thread was first, and its closing ended this thread's wait
                return
            first = self._reports.file(report)
            words = first.words if first == report else f"{first.words}. Therefore {report.words}"
            self._failure = words + self._numbering(), (first.rank,) if first.raised else ()
            # The report is in the store before connections close, which ends the waits of the other ranks.
            self.inner.close()
            if not first.raised and (missing := self._reports.missing()):
                silent = f"{words}. Nothing was heard of {ranks(missing)}: dead, or not waiting for anybody"
                self._failure = silent + self._numbering(), missing

    def _numbering(self) -> str:
        members = self.members
        same = members == tuple(range(len(members)))
        return "" if same else f". Ranks are those of the context-parallel group, globally {list(members)}"


@dataclass(frozen=True)
class _Exchange:
    """Messages in flight, whose failure is reported."""

    guarded: Guarded
    works: InFlight

    def wait(self) -> None:
        self.guarded.wait(self.works)


def _exchange_of(messages: Sequence[Message]) -> str:
    what = " and ".join(dict.fromkeys(message.what for message in messages))
    return f"an exchange of {what} with {ranks(tuple(sorted({message.peer for message in messages})))} to start"


def _cause(raw: RuntimeError) -> str:
    """What an error of torch.distributed means, in words; its own message if it is not known."""
    text = " ".join(str(raw).split())
    if "timed out" in text.lower():
        return "nothing came"
    if any(known in text for known in ("onnection", "Broken pipe", "pair closure")):
        return "a connection is closed"
    return text[:300]
