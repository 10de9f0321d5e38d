"""The failure of a rank: the error that every other rank raises, and how its message reaches them.

The message goes through the group's store (`torch.distributed.Store`), which exists for every backend and still works
when connections between ranks are broken. It is read and written only after a failure.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch.distributed as dist

_FIRST = "distflash/failure"
_STOPPED = "distflash/stopped"

# How long a rank that stops waits for the reports of the others, in seconds.
_GATHERING = 1.0
# How long a rank waits for the store, which may be in the process that died, in seconds.
_STORE_ANSWERS = 3.0

T = TypeVar("T")


class RankFailure(RuntimeError):
    """A rank of the group died, raised, or exceeded the timeout. Every other rank of the group raises this.

    The message names the rank that failed first and its error. For the rank that raises it, it also names the call, the
    direction, the ring step, the peer and what it waited for. ``__cause__`` is the error of torch.distributed, if any.

    Attributes:
        failed: the ranks of the group that failed, as far as they are known.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, timeout=60)
        >>> try:
        ...     out = df.attention(*torch.randn(3, 1, 10, 4, 64), cp=cp)
        ... except df.RankFailure as failure:  # not here: both ranks came
        ...     print(failure.failed)
    """

    def __init__(self, message: str, failed: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.failed = failed


@dataclass(frozen=True)
class FailureReport:
    """Why a rank stops.

    Attributes:
        rank: the rank that stops.
        raised: whether it raised an error of its own; otherwise its wait for another rank failed.
        words: what happened, in words.
    """

    rank: int
    raised: bool
    words: str


class FailureReports:
    """The failure reports of one group, shared by its ranks through a store.

    Args:
        store: returns the store; called only after a failure. If it fails as well, each rank knows only its own report.
    """

    def __init__(self, store: Callable[[], dist.Store], rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def read(self) -> FailureReport | None:
        """The first report of the group, if there is one and the store answers."""

        def read() -> FailureReport | None:
            store = self._store()
            return _report(store.get(_FIRST)) if store.check([_FIRST]) else None

        return _in_time(read)

    def file(self, report: FailureReport) -> FailureReport:
        """Write ``report`` to the store, and return the group's first report, which may be another rank's."""

        def file() -> FailureReport:
            store = self._store()
            first = _report(store.compare_set(_FIRST, "", json.dumps(asdict(report))))
            store.set(f"{_STOPPED}/{self._rank}", report.words)
            return first

        return _in_time(file) or report

    def missing(self) -> tuple[int, ...]:
        """The ranks without a report after a second; none if the store does not answer."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]

        def missing() -> tuple[int, ...]:
            store, deadline = self._store(), time.monotonic() + _GATHERING
            while True:
                silent = tuple(rank for rank in others if not store.check([f"{_STOPPED}/{rank}"]))
                if not silent or time.monotonic() > deadline:
                    return silent
                time.sleep(0.02)

        return _in_time(missing) or ()


def ranks(numbers: tuple[int, ...]) -> str:
    """``rank 1``, or ``ranks 1, 2``."""
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def _report(value: bytes) -> FailureReport:
    return FailureReport(**json.loads(value))


def _in_time(work: Callable[[], T]) -> T | None:
    """``work()``, or None if it fails or takes too long."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception:  # the store is gone: this rank's own report is raised all the same
            return

    thread = threading.Thread(target=run, name="distflash store", daemon=True)
    thread.start()
    thread.join(_STORE_ANSWERS)
    return results[0] if results else None
