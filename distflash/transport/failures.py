"""When a rank fails: the one error that every other rank raises, and how its words reach them.

The words go through the group's store (`torch.distributed.Store`), which is there for every backend and works when the
connections between the ranks no longer do. Nothing is written to it, and nothing read, until something has failed.
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

# How long the ranks that stop wait for one another, to learn who does not stop.
_GATHERING = 1.0
# The store may live in the process that died: it is not waited for any longer.
_STORE_ANSWERS = 3.0

T = TypeVar("T")


class RankFailure(RuntimeError):
    """A rank of the group died, raised, or did not come in time. Every other rank of the group raises this.

    The message names the rank that failed first and its error, and for the rank that raises it the call, the direction,
    the ring step, the peer and what it waited for. ``__cause__`` is the error of torch.distributed, if there was one.

    Attributes:
        failed: the ranks of the group that failed, as far as is known; empty where it is not.

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
class Report:
    """What a rank says when it stops.

    Attributes:
        rank: who says it.
        raised: whether it raised an error of its own; otherwise it waited in vain for another rank.
        words: what happened.
    """

    rank: int
    raised: bool
    words: str


class Reports:
    """The reports of one group, shared by its ranks through a store.

    Args:
        store: called when something has failed; where it fails in turn, ranks only know their own words.
    """

    def __init__(self, store: Callable[[], dist.Store], rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def read(self) -> Report | None:
        """The first report of the group, if there is one and the store answers."""

        def read() -> Report | None:
            store = self._store()
            return _report(store.get(_FIRST)) if store.check([_FIRST]) else None

        return _in_time(read)

    def file(self, report: Report) -> Report:
        """Put ``report`` where the others find it; returns the first one of the group, which may be another rank's."""

        def file() -> Report:
            store = self._store()
            first = _report(store.compare_set(_FIRST, "", json.dumps(asdict(report))))
            store.set(f"{_STOPPED}/{self._rank}", report.words)
            return first

        return _in_time(file) or report

    def missing(self) -> tuple[int, ...]:
        """The ranks that have filed nothing a second later; none where the store does not answer."""
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


def _report(value: bytes) -> Report:
    return Report(**json.loads(value))


def _in_time(work: Callable[[], T]) -> T | None:
    """``work()``, or None if it fails or does not come back."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception:  # without a store there are no words of others, and one's own are raised all the same
            return

    thread = threading.Thread(target=run, name="distflash store", daemon=True)
    thread.start()
    thread.join(_STORE_ANSWERS)
    return results[0] if results else None
