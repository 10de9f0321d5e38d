"""Errors that decoding kernels detect on the device, and that the host raises later.

On GPUs the host does not wait for a step: it reads the error flag of two steps before. So all ranks raise before the
same step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.kernels.decoding import BEYOND, DIFFER, FULL

# Error messages by flag.
WORDS = {
    DIFFER: "q: ranks have different tokens, or caches of different lengths, in a step of decoding; expected the same "
    "on every rank. Broadcast the chosen token from one rank",
    FULL: "cache: a captured step ran out of room; expected at most the capacity. Call cache.make_room(mask) between "
    "replays where the mask forgets, or make a cache of a larger capacity",
    BEYOND: "cache: a captured step went beyond the positions that it was captured for, as many as the capacity; "
    "capture it again",
}
_BEHIND = 2


class Faults:
    """Of one cache.

    Args:
        fault: int32 ``[1]``, `Store.fault`.
    """

    def __init__(self, fault: Tensor) -> None:
        self.captured = False
        self._fault = fault
        self._steps = 0
        self._on_gpu = fault.device.type == "cuda"
        self._seen = torch.zeros(_BEHIND, dtype=torch.int32, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(_BEHIND)] if self._on_gpu else []

    def note(self) -> None:
        """A step has been queued. Raises ValueError on a CPU, where it is done."""
        self._steps += 1
        if not self._on_gpu:
            self.raise_now()
            return
        at = self._steps % _BEHIND
        self._seen[at : at + 1].copy_(self._fault, non_blocking=True)
        self._events[at].record()

    def raise_late(self) -> None:
        """Before the next step: raise ValueError if there was a fault two steps ago, or in a replay of a graph."""
        if self.captured:
            self.raise_now()
        elif self._on_gpu and self._steps >= _BEHIND:
            at = (self._steps + 1) % _BEHIND
            self._events[at].synchronize()
            self._raise(int(self._seen[at]))

    def raise_now(self) -> None:
        """Raise ValueError if there is a fault. Waits for the device if any step has been made since the last time."""
        if self._steps or self.captured:
            self._steps = 0
            self._raise(int(self._fault))

    def _raise(self, fault: int) -> None:
        if fault:
            self._steps = 0
            self._fault.zero_()
            raise ValueError(WORDS[fault])
