"""Wall time, including the host's work; `common.Clock` times the device only.

Each sample starts on an idle device. ``host`` is the time until the call returns; it does not wait for the device if
the call makes fewer than 1024 launches, the driver's queue. ``wall`` ends when the device has finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from benchmarks import common

Call = Callable[[], object]
# The device time of so few samples is a median, too; they are slow, since the device waits for the host before each.
_DEVICE_SAMPLES = 5


@dataclass(frozen=True)
class Times:
    """Seconds of one call, medians on the slowest rank; ``device`` is None where the clock is the host's."""

    wall: float
    host: float
    device: float | None
    repeats: int


class Stopwatch:
    """Times calls in turns. All ranks must time the same calls.

    Args:
        device: where the calls run.
        seconds: how long to measure each call, about.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self._token = torch.zeros(1, device=device)

    def medians(self, calls: Mapping[str, Call]) -> dict[str, Times]:
        """All calls have run before."""
        first = {name: common.worst(self._ranks(self._sample(call)[0])) for name, call in calls.items()}
        repeats = {name: min(50, max(3, round(self.seconds / max(guess, 1e-6)))) for name, guess in first.items()}
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for turn in range(max(repeats.values(), default=0)):
            for name, call in calls.items():
                if turn < repeats[name]:
                    samples[name].append(self._sample(call))
        return {name: self._times(calls[name], taken) for name, taken in samples.items()}

    def _times(self, call: Call, samples: list[tuple[float, float]]) -> Times:
        wall, host = (common.worst(self._ranks(median(values))) for values in zip(*samples, strict=True))
        return Times(wall, host, self._device_seconds(call, host), len(samples))

    def _ranks(self, value: float) -> list[float]:
        return common.over_ranks(value, self.device)

    def _sample(self, call: Call) -> tuple[float, float]:
        self._together()
        begin = time.perf_counter()
        call()
        returned = time.perf_counter()
        self._wait()
        return time.perf_counter() - begin, returned - begin

    def _device_seconds(self, call: Call, host: float) -> float | None:
        """Between two events on the device, which waits before the first until the host has got through."""
        if not common.is_gpu(self.device):
            return None
        samples = []
        for _ in range(_DEVICE_SAMPLES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._together()
            torch.cuda._sleep(int((1.5 * host + 1e-3) * common.CYCLES_PER_SECOND))
            if dist.is_initialized():
                dist.all_reduce(self._token)  # on the device: all ranks begin together
            begin.record()
            call()
            end.record()
            self._wait()
            samples.append(begin.elapsed_time(end) / 1e3)
        return common.worst(self._ranks(median(samples)))

    def _together(self) -> None:
        """All ranks are here, and their devices have nothing left to do."""
        self._wait()
        if dist.is_initialized():
            dist.all_reduce(self._token)
            self._wait()

    def _wait(self) -> None:
        if common.is_gpu(self.device):
            torch.cuda.synchronize()
