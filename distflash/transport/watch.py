"""A look-out for exchanges that run on a device, where no call of the host waits for them.

gloo's waits are calls that end with an error. NCCL's are kernels: when a peer is gone the host is blocked later,
outside this package (`loss.item()`), for as long as the kernel waits. So a thread looks four times a second whether
what was queued is done. It asks what to do only if nothing was completed in between, and ends when nothing is left to
watch.
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
    """Something that was queued: how to find out whether it is done, and what to call it."""

    done: Done
    what: str


class Watch:
    """Watches what was queued, in its order.

    Args:
        stuck: called by the thread with ``(what, seconds)`` whenever nothing was completed for ``interval``: what is
            waited for, and since how long nothing was completed. If it returns True the thread ends.
        interval: seconds between two looks.
    """

    def __init__(self, stuck: Callable[[str, float], bool], interval: float = 0.25) -> None:
        self._stuck, self._interval = stuck, interval
        self._lock = threading.Lock()
        self._queue: list[_Queued] = []
        self._thread: threading.Thread | None = None

    def add(self, done: Done, what: str) -> None:
        """Watch until ``done()``; starts the thread if there is none."""
        with self._lock:
            self._queue.append(_Queued(done, what))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="distflash watch", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        progress = time.monotonic()
        while True:
            time.sleep(self._interval)
            with self._lock:
                # Things get done in the order in which they were queued, so few have to be asked.
                done = bisect_left(self._queue, True, key=lambda queued: not queued.done())
                del self._queue[:done]
                if not self._queue and not done:
                    self._thread = None
                    return
                oldest = self._queue[0] if self._queue else None
            if done or oldest is None:
                progress = time.monotonic()
            elif self._stuck(oldest.what, time.monotonic() - progress):
                with self._lock:
                    self._queue.clear()
                    self._thread = None
                return
