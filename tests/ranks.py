"""Real ranks for tests: processes that stay, run one function after another, and never hang the suite.

    ranks = Ranks(4, "gloo")
    results = ranks.run(function, argument)      # function(argument) as each rank; a function of a module, by rank
    ranks.stop()

A rank that raises, dies or keeps the others waiting fails the call with its rank and its traceback; the next call
starts fresh processes if any of them is no longer in a known state.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distflash as df
from benchmarks.common import take_gpu

# How long the other ranks may take to fail as well once one has: each may have a message of its own.
_GRACE = 5.0


class RankError(AssertionError):
    """A rank raised, died or did not come back."""


@dataclass(frozen=True)
class Reply:
    """A rank's result if ``ok``, else its error."""

    ok: bool
    value: Any


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Ranks:
    """``count`` processes in one process group.

    Args:
        backend: "gloo", or "nccl" with GPU n (modulo the number of GPUs) for rank n.
        timeout: seconds that a call of `run` may take.
    """

    def __init__(self, count: int, backend: str, timeout: float = 60.0) -> None:
        self.count, self.backend, self.timeout = count, backend, timeout
        self._workers: list[_Worker] = []

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """``work(*args)`` as every rank; the results by rank.

        Raises:
            RankError: with the traceback of every rank that failed.
        """
        replies = self.replies(work, *args)
        failures = [f"rank {rank}: {replies[rank].value}" for rank in sorted(replies) if not replies[rank].ok]
        silent = [str(rank) for rank in range(self.count) if rank not in replies]
        if silent:
            failures.append(f"rank {', '.join(silent)}: no answer, ended")
        if failures:
            raise RankError("\n".join(failures))
        return [replies[rank].value for rank in range(self.count)]

    def replies(self, work: Callable[..., Any], *args: Any) -> dict[int, Reply]:
        """Like `run`, but failures are told by rank; ranks that did not come back are left out."""
        if not self._workers:
            self._start()
        for worker in self._workers:
            worker.pipe.send((work, args))
        replies = self._receive_all()
        if len(replies) < self.count or not all(self._alive()):
            self.stop()
        return replies

    def stop(self) -> None:
        """End the processes, by force if need be."""
        for worker in self._workers:
            worker.pipe.close()
        deadline = time.monotonic() + _GRACE
        for worker in self._workers:
            worker.process.join(max(0.1, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def _start(self) -> None:
        preload()
        context = multiprocessing.get_context("forkserver")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            arguments = (theirs, self.backend, rank, self.count, str(store), self.timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _receive_all(self) -> dict[int, Reply]:
        """What the ranks answer in time; once one has failed, the others have `_GRACE` to say so too."""
        replies: dict[int, Reply] = {}
        waiting = {worker.pipe: rank for rank, worker in enumerate(self._workers)}
        deadline = time.monotonic() + self.timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[index]
                replies[rank] = self._receive(rank)
                if not replies[rank].ok:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return replies

    def _receive(self, rank: int) -> Reply:
        worker = self._workers[rank]
        try:
            return Reply(*worker.pipe.recv())
        except (EOFError, ConnectionError):
            worker.process.join(_GRACE)
            return Reply(False, f"died with exit code {worker.process.exitcode}")

    def _alive(self) -> list[bool]:
        return [worker.process.is_alive() for worker in self._workers]


def preload(*modules: str) -> None:
    """Start the process that all ranks are forked from, with these modules loaded. The first call decides.

    It has loaded torch too, and what the jobs load, but no CUDA, and forks a rank in a tenth of a second.
    """
    jobs = ["distflash.recipes.trainer", "matplotlib.backends.backend_agg"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["distflash", "tests.dense", *jobs, *modules])
    forkserver.ensure_running()


def as_near() -> df.transport.Distributed:
    """All ranks, as a rank sees them where each has a GPU of one host: on CPUs, or sharing a GPU, they seem far."""
    transport = df.transport.Distributed(dist.group.WORLD)
    transport.intra_node = True
    return transport


def _serve(pipe: Connection, backend: str, rank: int, count: int, store: str, timeout: float) -> None:
    """A rank's life: join, answer calls until the pipe closes, leave."""
    torch.set_num_threads(1)
    device = take_gpu(rank, count) if backend == "nccl" else None
    limit = timedelta(seconds=timeout)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit, device_id=device
    )
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            break
        try:
            answer = (True, work(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    dist.destroy_process_group()
