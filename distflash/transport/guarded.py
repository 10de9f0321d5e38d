"""A process group whose ranks tell one another why they stop.

Where a rank waits for others, an error of torch.distributed becomes a `RankFailure`, which says where the rank waited,
and for what. Before it is raised, these words are put into the group's store and the group's connections are closed.
That ends the waits of the other ranks, who find the words in the store. A rank that raises an error of its own in the
middle of a call does the same.
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
from distflash.transport.distributed import Distributed, UnderWay
from distflash.transport.failures import RankFailure, Report, Reports, ranks
from distflash.transport.watch import Watch

Direction = Literal["forward", "backward"]


def during(transport: Transport, direction: Direction, q: Tensor) -> AbstractContextManager[None]:
    """The part of a call in which ranks wait for one another: a rank that raises in it tells the others."""
    return transport.during(direction, q.shape) if isinstance(transport, Guarded) else nullcontext()


def preparing(transport: Transport) -> AbstractContextManager[None]:
    """The part of a call between the ranks' agreement and its first message: a rank that raises in it tells the others.

    Not of a ValueError, which is about what the ranks have agreed on: all raise the same, and can go on.
    """
    return transport.preparing() if isinstance(transport, Guarded) else nullcontext()


@dataclass(frozen=True)
class _Call:
    number: int
    direction: Direction
    shape: torch.Size

    def __str__(self) -> str:
        return f"in call {self.number}, {self.direction} of q {tuple(self.shape)},"


@dataclass(frozen=True)
class _Part(AbstractContextManager[None]):
    """A part of a call. A class, since a generator costs the host several times as much."""

    guarded: Guarded
    allowed: tuple[type[BaseException], ...]
    in_call: bool

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.guarded.leave(error, self.allowed)
        if self.in_call:
            self.guarded.leave_call()


class Guarded:
    """`Distributed`, with words for what goes wrong. All else is passed on."""

    def __init__(self, inner: Distributed) -> None:
        self.inner = inner
        self.rank, self.world_size, self.device = inner.rank, inner.world_size, inner.device
        self.checks_every_call, self.near = inner.checks_every_call, inner.near
        self.carries = inner.carries
        self._reports = Reports(lambda: inner.store, inner.rank, inner.world_size)
        # Marks cost the host some 10 us an exchange, and must not be asked about while a CUDA graph is captured.
        self._watches = inner.device.type == "cuda" and inner.timeout is not None
        self._watch = Watch(self._is_stuck)
        self._calls = 0
        self._call: _Call | None = None
        self._in_call = _Part(self, (RankFailure,), in_call=True)
        self._in_preparation = _Part(self, (ValueError, RankFailure), in_call=False)
        self._giving_up = threading.Lock()
        # Words, not an exception: its traceback would keep the tensors of the call.
        self._failure: tuple[str, tuple[int, ...]] | None = None

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of this group by their numbers in the default group."""
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

    def leave(self, error: BaseException | None, allowed: tuple[type[BaseException], ...]) -> None:
        """A part of a call is over: tell the others of an error, but for those allowed."""
        if error is not None and not isinstance(error, allowed):
            self._tell(error)

    def leave_call(self) -> None:
        self._call = None

    def require_sound(self) -> None:
        """Raises `RankFailure` with the words of the first failure, if there was one."""
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

    def wait(self, works: UnderWay) -> None:
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
        self.require_sound()  # a wait that was ended from outside returns whatever lies in memory

    def _queued(self, what: str) -> None:
        """Have what the device was given until now watched. Strings only: a message would keep its tensor."""
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
        """This rank raises: tell the others, who may wait for it."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self._give_up(Report(self.rank, True, f"rank {self.rank} raised{self._where()} {reason}"))

    def _stop(self, raw: RuntimeError, what: str, start: float) -> NoReturn:
        """This rank waited in vain: tell the others, who may wait for it in turn, and raise."""
        self._give_up(self._waited(self._waiting_for(what), time.monotonic() - start, _cause(raw)))
        assert self._failure is not None
        raise RankFailure(*self._failure) from raw

    def _is_stuck(self, waiting_for: str, seconds: float) -> bool:
        """On devices: give up at the deadline, or if another rank has. Called by the thread of the watch."""
        limit = self.inner.timeout
        late = limit is not None and seconds >= limit.total_seconds()
        if late or self._reports.read() is not None:
            self._give_up(self._waited(waiting_for, seconds, "nothing came"))
        return self._failure is not None

    def _waited(self, waiting_for: str, seconds: float, cause: str) -> Report:
        return Report(self.rank, False, f"rank {self.rank} waited {seconds:.1f} s{waiting_for}: {cause}")

    def _give_up(self, report: Report) -> None:
        with self._giving_up:
            if self._failure is not None:  # by the thread of the watch, whose closing ended a wait of this one
                return
            first = self._reports.file(report)
            words = first.words if first == report else f"{first.words}. Therefore {report.words}"
            self._failure = words + self._numbering(), (first.rank,) if first.raised else ()
            # The words are in the store before any connection closes, which is what ends the waits of the others.
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
    """Messages in flight, of which a failure to arrive has words."""

    guarded: Guarded
    works: UnderWay

    def wait(self) -> None:
        self.guarded.wait(self.works)


def _exchange_of(messages: Sequence[Message]) -> str:
    what = " and ".join(dict.fromkeys(message.what for message in messages))
    return f"an exchange of {what} with {ranks(tuple(sorted({message.peer for message in messages})))} to start"


def _cause(raw: RuntimeError) -> str:
    """What an error of torch.distributed means, in words; its own where they are not known."""
    text = " ".join(str(raw).split())
    if "timed out" in text.lower():
        return "nothing came"
    if any(known in text for known in ("onnection", "Broken pipe", "pair closure")):
        return "a connection is closed"
    return text[:300]
