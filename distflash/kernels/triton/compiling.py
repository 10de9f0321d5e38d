"""Compiles what a piece of work launches, in several processes, for a GPU that need not be there.

Each process goes through all of the work, whose tensors hold no data. Launches do nothing there. The first launch of a
specialisation (a kernel for certain types, constants and alignments) would compile it. Process n of N takes every N-th
specialisation and skips the others. What is compiled goes to triton's cache on disk, where the real launch finds it.

Processes of several ranks, and jobs, share that folder: one locks a specialisation while it compiles it, the others
wait and then find it.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from distflash.kernels.machine import Machine

VERSION = triton.__version__
Work = Callable[[], object]
# Beyond all numbers of GPUs: what was compiled for a GPU that is there is not launched on one that is not.
_NO_DEVICE = -1


@dataclass(frozen=True)
class Outcome:
    """Of all processes.

    Attributes:
        compiled: the names of what they compiled, or found on disk.
        errors: why processes ended early, a line each.
    """

    compiled: tuple[str, ...]
    errors: tuple[str, ...]


class Workers:
    """Processes that have begun to compile.

    Args:
        work: launches kernels, on tensors of the device "meta" or none at all.
        machine: the GPU to compile for.
        processes: how many.

    Raises:
        OSError: no process can be started here.
    """

    def __init__(self, work: Work, machine: Machine, processes: int) -> None:
        # Forked: a new Python would need longer to import torch and triton than most kernels need to compile. The
        # children use no GPU and no thread of this process.
        read_compiler_early().join()  # a fork while it imports modules would copy their locks
        read_compiler()  # in a process that was itself forked the thread is gone
        context = get_context("fork")
        self._readers, self._processes = [], []
        for n in range(processes):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(work, machine, n, processes, writer), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
                try:
                    process.start()
                except AssertionError as error:  # a daemon may have no children
                    raise OSError(str(error)) from error
            writer.close()
            self._readers.append(reader)
            self._processes.append(process)

    def wait(self, seconds: float) -> bool:
        """Whether all have ended after so many seconds at most."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        return not any(process.is_alive() for process in self._processes)

    def finish(self) -> Outcome:
        """What they have done; those that are not done are ended."""
        compiled: list[str] = []
        errors: list[str] = []
        for reader, process in zip(self._readers, self._processes, strict=True):
            if process.is_alive():
                process.kill()
            process.join()
            names, error = _received(reader)
            compiled += names
            if error is not None:
                errors.append(error)
        return Outcome(tuple(compiled), tuple(errors))


def cache_folder() -> Path:
    """Where triton keeps what it has compiled."""
    return Path(knobs.cache.dir)


def read_compiler() -> None:
    """Have triton read its own files (0.4 GB), once in a process. The keys of its cache contain a digest of them."""
    with suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()


@functools.cache
def read_compiler_early() -> threading.Thread:
    """`read_compiler` in a thread, since the first call needs the digest, even if all kernels are compiled.

    A call that comes before the thread is done reads the files itself.
    """
    reader = threading.Thread(target=read_compiler, name="distflash: reads the compiler", daemon=True)
    reader.start()
    return reader


def _received(reader: connection.Connection) -> tuple[list[str], str | None]:
    with suppress(EOFError, OSError):
        if reader.poll():
            found: tuple[list[str], str | None] = reader.recv()
            return found
    return [], "a process ended early"


def _run(work: Work, machine: Machine, number: int, of: int, writer: connection.Connection) -> None:
    gc.disable()  # it might find tensors of the parent's GPU, and free them
    share, error = Share(number, of, cache_folder() / "distflash"), None
    try:
        compile_share(work, machine, share)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    writer.send((share.compiled, error))


def compile_share(work: Work, machine: Machine, share: Share) -> None:
    """Run ``work`` and compile its share. In a process that has no other use for triton: its driver stays."""
    driver.set_active(NoGpu(machine))
    knobs.runtime.jit_cache_hook = share.skips
    knobs.runtime.jit_post_compile_hook = share.done
    work()


class Share:
    """Which specialisations a process compiles, as triton asks before and tells after it compiles one.

    Args:
        number, of: number n of N takes every N-th.
        locks: a folder for a file of each.
    """

    def __init__(self, number: int, of: int, locks: Path) -> None:
        self.number, self.of, self.locks = number, of, locks
        self.compiled: list[str] = []
        self._seen: dict[str, int] = {}
        self._lock: int | None = None

    def skips(self, *, key: str, fn: Any, **_: Any) -> bool:
        """Whether somebody else compiles this one."""
        name = f"{fn.name}, {key}"
        place = self._seen.setdefault(name, len(self._seen))
        if place % self.of != self.number:
            return True
        self.compiled.append(fn.name)
        self._take(hashlib.sha256(name.encode()).hexdigest())
        return False

    def done(self, **_: Any) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self, name: str) -> None:
        """Wait until nobody compiles it. Without locks, as on some network file systems, several may compile it."""
        with suppress(OSError):
            self.locks.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.locks / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX)


class _Launcher:
    """Hands nothing to no GPU."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.launch_cooperative_grid = False

    def __call__(self, *arguments: Any) -> None:
        return


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**31 - 1}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills, and the largest number of threads."""
        return object(), 1, 0, 0, 1024


class NoGpu:
    """A driver that knows for which GPU to compile, and has none."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def __init__(self, machine: Machine) -> None:
        amd = isinstance(machine.arch, str)
        self._target = GPUTarget("hip" if amd else "cuda", machine.arch, 64 if amd else 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return _NO_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0
