"""A launch as the driver takes it: the bytes of its parameters, in which only addresses change from call to call.

Triton's own way from arguments to the driver is Python, argument by argument. A packed launch is recorded once: Triton
launches into a graph that is never run, with made-up addresses, twice. What differs between the two recordings is where
the addresses are; so nothing is assumed about how Triton orders or expands its arguments.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence

import torch

from distflash import driver

_POINTER, _DESCRIPTOR = 8, 128  # bytes of a parameter
# Made-up addresses: multiples of every alignment, and far from one another.
_FIRST, _SECOND, _STEP = 2**36, 2**37, 2**24


class Packed:
    """A recorded launch.

    Args:
        one: the recording.
        slots: for each parameter that is an address, or has one, its place and the number of the tensor.
    """

    def __init__(self, one: driver.Recorded, slots: Sequence[tuple[int, int]]) -> None:
        offsets, total = [], 0
        for parameter in one.parameters:
            total = -(-total // _DESCRIPTOR) * _DESCRIPTOR if len(parameter) == _DESCRIPTOR else -(-total // 8) * 8
            offsets.append(total)
            total += len(parameter)
        self._memory = ctypes.create_string_buffer(total + _DESCRIPTOR)
        start = -(-ctypes.addressof(self._memory) // _DESCRIPTOR) * _DESCRIPTOR
        for offset, parameter in zip(offsets, one.parameters, strict=True):
            ctypes.memmove(start + offset, parameter, len(parameter))
        self._parameters = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        sizes = [len(parameter) for parameter in one.parameters]
        self._pointers = [
            (n, ctypes.c_uint64.from_address(start + offsets[at])) for at, n in slots if sizes[at] == _POINTER
        ]
        self._descriptors = [(n, start + offsets[at]) for at, n in slots if sizes[at] == _DESCRIPTOR]
        self._sizes = (one.kernel, *one.grid, *one.block, one.shared)
        self._device = torch.cuda.current_device()  # of the kernel, which was loaded there
        self._launch, self._replace = driver.launcher(), driver.replace_address()
        self._addresses: Sequence[int] = ()
        # The forward of one thread and the backward of another may launch the same kernel.
        self._lock = threading.Lock()

    @staticmethod
    def of(launch: Callable[[Sequence[int]], object], count: int) -> Packed | None:
        """Record ``launch``, which is called with the addresses of so many tensors; None where that cannot be done."""
        addresses = [[start + n * _STEP for n in range(count)] for start in (_FIRST, _SECOND)]
        try:
            one, other = (driver.recorded(lambda some=some: launch(some)) for some in addresses)  # type: ignore[misc]
            slots = _slots(one, other, *addresses)
            return None if slots is None else Packed(one, slots)
        except driver.DriverError:
            return None

    def run(self, addresses: Sequence[int]) -> None:
        """Launch on the current stream of the kernel's device, which is the current one, with these tensors."""
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        with self._lock:
            if addresses != self._addresses:
                for n, pointer in self._pointers:
                    pointer.value = addresses[n]
                for n, place in self._descriptors:
                    self._replace(place, addresses[n])
                self._addresses = addresses
            code = self._launch(*self._sizes, stream, self._parameters, None)
        if code:
            driver.require(code)


def _slots(
    one: driver.Recorded, other: driver.Recorded, first: Sequence[int], second: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Which parameters have which address; None where a difference is not explained by one."""
    slots = []
    for at, (a, b) in enumerate(zip(one.parameters, other.parameters, strict=True)):
        if a == b:
            continue
        changed = [n for n in range(len(first)) if _with_address(a, first[n], second[n]) == b]
        if len(changed) != 1:
            return None
        slots.append((at, changed[0]))
    return slots


def _with_address(parameter: bytes, old: int, new: int) -> bytes | None:
    """The parameter with another address; None if it does not have the old one."""
    if len(parameter) == _POINTER:
        return new.to_bytes(_POINTER, "little") if int.from_bytes(parameter, "little") == old else None
    if len(parameter) != _DESCRIPTOR:
        return None
    memory = ctypes.create_string_buffer(2 * _DESCRIPTOR)
    place = -(-ctypes.addressof(memory) // _DESCRIPTOR) * _DESCRIPTOR
    ctypes.memmove(place, parameter, _DESCRIPTOR)
    moved = driver.replace_address()
    driver.require(moved(place, old))
    if ctypes.string_at(place, _DESCRIPTOR) != parameter:
        return None
    driver.require(moved(place, new))
    return ctypes.string_at(place, _DESCRIPTOR)
