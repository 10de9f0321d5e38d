"""The few calls of the CUDA driver that a packed launch needs, through `ctypes`: see `distflash.kernels.packed`.

Signatures and structs are those of ``cuda.h`` (https://docs.nvidia.com/cuda/cuda-driver-api/).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class DriverError(RuntimeError):
    """A call of the driver failed, or is not there."""


class _KernelNode(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2``."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(str(error)) from error


def function(name: str, *types: Any) -> Callable[..., int]:
    """A function of the driver, which returns 0 or the number of an error.

    Raises:
        DriverError: this driver has no such function.
    """
    try:
        found = getattr(_library(), name)
    except AttributeError as error:
        raise DriverError(f"{name}: not in this driver") from error
    found.argtypes, found.restype = types, ctypes.c_int
    return found  # type: ignore[no-any-return]


def require(code: int) -> None:
    """Raises `DriverError` for the number of an error."""
    if code:
        raise DriverError(f"CUDA driver error {code}")


@functools.cache
def launcher() -> Callable[..., int]:
    """``cuLaunchKernel``: function, grid, block, shared bytes, stream, parameters, extra."""
    sizes = [ctypes.c_uint] * 7
    return function("cuLaunchKernel", ctypes.c_void_p, *sizes, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


@functools.cache
def replace_address() -> Callable[..., int]:
    """``cuTensorMapReplaceAddress``: a descriptor's place in memory, and the address it is to have."""
    return function("cuTensorMapReplaceAddress", ctypes.c_void_p, ctypes.c_void_p)


def _parameter_sizes(kernel: int) -> list[int]:
    """How many bytes each parameter of a loaded kernel has."""
    size, offset = ctypes.c_size_t(), ctypes.c_size_t()
    pointers = ctypes.POINTER(ctypes.c_size_t)
    ask = function("cuFuncGetParamInfo", ctypes.c_void_p, ctypes.c_size_t, pointers, pointers)
    sizes: list[int] = []
    while ask(kernel, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes


@dataclass(frozen=True)
class Recorded:
    """A launch of one kernel, as the driver was given it.

    Attributes:
        kernel: the function's handle.
        grid, block, shared: the launch's sizes.
        parameters: the bytes of each.
    """

    kernel: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    parameters: tuple[bytes, ...]


def recorded(launch: Callable[[], object]) -> Recorded:
    """What ``launch`` launches, without running it: it is captured into a graph, which is read and thrown away.

    Raises:
        DriverError: it launches more or less than one kernel, or the driver cannot tell.
    """
    graph, count, node = ctypes.c_void_p(), ctypes.c_size_t(1), ctypes.c_void_p()
    handle, size = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
    begin = function("cuStreamBeginCapture_v2", handle, ctypes.c_int)
    stream = torch.cuda.Stream()
    require(begin(stream.cuda_stream, _RELAXED))
    try:
        with torch.cuda.stream(stream):
            launch()
    finally:
        end = function("cuStreamEndCapture", handle, ctypes.POINTER(handle))
        require(end(stream.cuda_stream, ctypes.byref(graph)))
    try:
        nodes = function("cuGraphGetNodes", handle, ctypes.POINTER(handle), size)
        require(nodes(graph, None, ctypes.byref(count)))
        if count.value != 1:
            raise DriverError(f"{count.value} nodes where one launch was expected")
        require(nodes(graph, ctypes.byref(node), ctypes.byref(count)))
        return _node(node)
    finally:
        require(function("cuGraphDestroy", handle)(graph))


def _node(node: ctypes.c_void_p) -> Recorded:
    found = _KernelNode()
    ask = function("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p, ctypes.POINTER(_KernelNode))
    require(ask(node, ctypes.byref(found)))
    sizes = _parameter_sizes(found.function)
    parameters = tuple(ctypes.string_at(found.parameters[n], size) for n, size in enumerate(sizes))
    return Recorded(found.function, tuple(found.grid), tuple(found.block), found.shared, parameters)
