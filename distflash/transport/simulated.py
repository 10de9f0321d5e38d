"""A simulator of all ranks in one process, which counts messages and bytes.

Every rank is a thread, but only one thread runs at a time, until it waits for a message. So code that runs in it need
not be thread-safe, runs are repeatable, and a deadlock is reported instead of hanging.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from distflash.transport.base import Message


class SimulationError(RuntimeError):
    """A simulated rank failed, or all running ranks wait for messages that no rank sends."""


@dataclass
class Traffic:
    """What `Transport.exchange` sent, over all ranks. Collectives are not counted."""

    messages: int = 0
    bytes: int = 0
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def count(self, source: int, destination: int, tensor: Tensor) -> None:
        self.messages += 1
        self.bytes += tensor.numel() * tensor.element_size()
        self.pairs.append((source, destination))


class Simulator:
    """A group of ``world_size`` simulated ranks on one device.

    Args:
        world_size: the number of ranks, at least 1.
        device: the device of the ranks' tensors: "cpu", or one GPU that all ranks share.
        shape: of a mesh of the ranks; None for one dimension.

    Examples:
        >>> def work(transport):
        ...     cp = df.ContextParallel(transport)
        ...     out = df.attention(*torch.randn(3, 1, 10, 4, 64), mask=df.Causal(), cp=cp)
        ...     return cp.rank, tuple(out.shape)
        >>> simulator = df.transport.Simulator(3)
        >>> simulator.run(work)
        [(0, (1, 10, 4, 64)), (1, (1, 10, 4, 64)), (2, (1, 10, 4, 64))]
        >>> simulator.traffic.messages
        12
    """

    def __init__(
        self, world_size: int, device: torch.device | str = "cpu", shape: tuple[int, ...] | None = None
    ) -> None:
        if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
            raise ValueError(f"world_size: expected a number of ranks, at least 1, got {world_size!r}")
        if shape is not None and prod(shape) != world_size:
            raise ValueError(f"shape: expected dimensions whose product is {world_size}, got {shape}")
        self.world_size = world_size
        self.shape = shape or (world_size,)
        self.device = _with_index(torch.device(device))
        self.traffic = Traffic()
        # One lock, so that one rank runs at a time, and a condition for each rank, so that a message wakes only its
        # receiver.
        self._turn = threading.RLock()
        self._wake = [threading.Condition(self._turn) for _ in range(world_size)]
        self._mail: dict[tuple[int, int, bool], deque[Tensor]] = {}
        self._expected: dict[tuple[int, int], deque[Message]] = {}
        self._running = 0
        self._waiting: dict[int, deque[Tensor]] = {}
        self._failure: BaseException | None = None

    def run(self, work: Callable[[SimulatedTransport], Any]) -> list[Any]:
        """Call ``work(transport)`` as each rank and return the results by rank.

        A rank's backward passes run in its own thread. (On GPUs autograd would run those of all ranks in its one thread
        of the device, which would block all ranks at the first wait for a message.)

        Raises:
            BaseException: the first error that a rank raised, with its traceback and a note that names the rank.
        """
        self._mail.clear()
        self._expected.clear()
        self._waiting.clear()
        self._failure, self._running = None, self.world_size
        results: list[Any] = [None] * self.world_size
        threads = [
            threading.Thread(target=self._run_rank, args=(rank, work, results), name=f"rank {rank}", daemon=True)
            for rank in range(self.world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failure, self._failure = self._failure, None  # whose traceback keeps the ranks' tensors alive
        if failure is not None:
            raise failure
        return results

    def _run_rank(self, rank: int, work: Callable[[SimulatedTransport], Any], results: list[Any]) -> None:
        with self._turn:
            try:
                with _on(self.device), torch.autograd.set_multithreading_enabled(False):
                    results[rank] = work(SimulatedTransport(self, rank, self.device))
            except BaseException as error:
                if self._failure is None:
                    error.add_note(f"raised by simulated rank {rank} of {self.world_size}")
                    self._failure = error
            finally:
                self._running -= 1
                self._wake_all()

    def _put(self, source: int, destination: int, tensor: Tensor, collective: bool) -> Tensor:
        if not collective:
            self.traffic.count(source, destination, tensor)
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._box(source, destination, collective).append(copy)
        self._wake[destination].notify()
        return copy

    def _take(self, source: int, destination: int, collective: bool) -> Tensor:
        box = self._box(source, destination, collective)
        self._waiting[destination] = box
        try:
            while not box:
                if self._failure is None and self._stuck():
                    self._failure = SimulationError(
                        f"deadlock: every running rank waits, rank {destination} for a message from rank {source}"
                    )
                    self._wake_all()
                    raise self._failure
                if self._failure is not None:
                    raise SimulationError("another simulated rank failed") from self._failure
                self._wake[destination].wait()
        finally:
            del self._waiting[destination]
        return box.popleft()

    def _wake_all(self) -> None:
        for rank in self._wake:
            rank.notify()

    def _box(self, source: int, destination: int, collective: bool) -> deque[Tensor]:
        return self._mail.setdefault((source, destination, collective), deque())

    def _stuck(self) -> bool:
        return len(self._waiting) == self._running and not any(self._waiting.values())


def _with_index(device: torch.device) -> torch.device:
    bare = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if bare else device


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` the current GPU, which in a new thread is the first one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class _InFlight:
    transport: SimulatedTransport
    sent: Sequence[tuple[Tensor, Tensor]]
    receives: Sequence[Message]

    def wait(self) -> None:
        for tensor, copy in self.sent:
            if not torch.equal(_bytes(tensor), _bytes(copy)):
                raise SimulationError(f"rank {self.transport.rank} changed a tensor while it was being sent")
        for message in self.receives:
            self.transport.receive(message)


def _bytes(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor (whose strides may be arbitrary if it has one element)."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


@dataclass(frozen=True)
class SimulatedTransport:
    """One rank's end of a `Simulator`."""

    simulator: Simulator
    rank: int
    device: torch.device = torch.device("cpu")
    verifies_every_call: bool = True
    intra_node: bool = True

    @property
    def world_size(self) -> int:
        return self.simulator.world_size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.simulator.shape

    def supports_device(self, device: torch.device) -> bool:
        return True

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _InFlight:
        for message in (*sends, *receives):
            assert message.peer != self.rank, "a rank does not send to itself"
            tensor = message.tensor
            assert tensor.is_contiguous() and not tensor.is_neg(), "contiguous, and no view that negates"
        put = self.simulator._put
        sent = [(m.tensor, put(self.rank, m.peer, m.tensor, collective=False)) for m in sends]
        # Code that reads a tensor without waiting for it gets NaN.
        for message in receives:
            self._expected(message.peer).append(message)
            if message.tensor.is_floating_point():
                message.tensor.fill_(torch.nan)
        return _InFlight(self, sent, receives)

    def receive(self, message: Message) -> None:
        """Wait for a message, and for earlier ones from the same rank."""
        expected = self._expected(message.peer)
        while any(each is message for each in expected):
            got, buffer = self.simulator._take(message.peer, self.rank, collective=False), expected.popleft().tensor
            if got.shape != buffer.shape or got.dtype != buffer.dtype:
                raise SimulationError(
                    f"rank {self.rank} expected {buffer.dtype} {tuple(buffer.shape)} from rank {message.peer} and got "
                    f"{got.dtype} {tuple(got.shape)}"
                )
            buffer.copy_(got)

    def _expected(self, source: int) -> deque[Message]:
        return self.simulator._expected.setdefault((source, self.rank), deque())

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [of_rank.tolist() for of_rank in self.all_gather(torch.tensor(values, dtype=torch.int64))]

    def all_gather(self, x: Tensor) -> list[Tensor]:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        for rank in others:
            self.simulator._put(self.rank, rank, x, collective=True)
        received = {rank: self.simulator._take(rank, self.rank, collective=True) for rank in others}
        return [x if rank == self.rank else received[rank] for rank in range(self.world_size)]

    def gather_equal(self, x: Tensor) -> Tensor:
        return torch.stack(self.all_gather(x))

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.all_gather(x)).sum(0)
