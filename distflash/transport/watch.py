"""A thread that watches exchanges on a GPU, which no call of the host waits for.

A wait of gloo is a call that raises an error. NCCL waits in kernels: if a peer is gone, the host blocks later, outside
of this package (`loss.item()`), for as long as the kernel waits. So a thread checks four times a second whether queued
work is done. If nothing was completed since the last check, it calls ``stuck``. It ends when nothing is queued.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

Done = Callable[[], bool]


@dataclass(frozen=True)
class _Queued:
    """Queued work: whether it is done, and its description."""

    done: Done
    what: str


class Watch:
    """Watches queued work, in its order.

    Args:
        stuck: called by the thread with ``(what, seconds)`` if nothing was completed for ``interval``: the description
            of the oldest work, and the time since work was last completed. If it returns True, the thread ends.
        interval: seconds between two checks.
    """

    def __init__(self, stuck: Callable[[str, float], bool], interval: float = 0.25) -> None:
        self._stuck, self._interval = stuck, interval
        self._lock = threading.Lock()
        self._queue: list[_Queued] = []
        # Destroying a CUDA event waits for a copy to the host in another thread, which may wait for a rank that failed.
        # So the watching thread only moves what is done here, and `add` lets go of it.
        self._finished: list[_Queued] = []
        self._thread: threading.Thread | None = None

    def add(self, done: Done, what: str) -> None:
        """Watch until ``done()``; starts the thread if there is none."""
        with self._lock:
            finished, self._finished = self._finished, []
            self._queue.append(_Queued(done, what))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="distflash watch", daemon=True)
                self._thread.start()
        finished.clear()  # without the lock, for which the thread would wait

    def _run(self) -> None:
        progress = time.monotonic()
        while True:
            time.sleep(self._interval)
            with self._lock:
                # Work completes in the order in which it was queued, so a bisection finds the first that is not done.
                done = bisect_left(self._queue, True, key=lambda queued: not queued.done())
                self._finished += self._queue[:done]
                del self._queue[:done]
                if not self._queue and not done:
                    self._thread = None
                    return
                oldest = self._queue[0].what if self._queue else None  # not the work: see `_finished`
            if done or oldest is None:
                progress = time.monotonic()
            elif self._stuck(oldest, time.monotonic() - progress):
                with self._lock:
                    self._finished += self._queue
                    self._queue = []
                    self._thread = None
                return
