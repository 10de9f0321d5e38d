"""Transport by the copy engines of GPUs with peer-to-peer access, which uses no kernel and no multiprocessor.

A sender copies a message into a buffer that its peer can read, and the peer's copy engine copies it from there. Flags
in the same memory say that a buffer is full or free. GPU streams wait for them, the host does not. A flag is 0 or 1,
and the waiting stream resets it, so a captured exchange can be replayed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from distflash import driver
from distflash.transport.base import Message
from distflash.transport.distributed import Distributed

# Bytes per flag: each has a cache line of its own.
_FLAG = 128
_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_HANDLE, _ADDRESS = ctypes.c_void_p, ctypes.c_uint64
_OF_FLAGS = _HANDLE, _ADDRESS, ctypes.c_uint32, ctypes.c_uint
_OF_COPIES = _ADDRESS, _ADDRESS, ctypes.c_size_t, _HANDLE
_SLOTS = 2  # buffers per direction between two ranks: one is filled while the other is read


@dataclass(frozen=True)
class Copies:
    """An exchange in flight. It keeps its tensors alive until `wait`."""

    events: Sequence[torch.cuda.Event]
    works: Sequence[Message]

    def wait(self) -> None:
        """Make the current stream wait for all copies. The host does not wait."""
        stream = current_stream()
        for event in self.events:
            stream.wait_event(event)

    def describe(self) -> str:
        """What is waited for, in words."""
        peers = sorted({message.peer for message in self.works})
        return f"{self.works[0].what} (copies between this rank and ranks {peers})"


class CopyEngine(Distributed):
    """The ranks of a process group whose GPUs have peer-to-peer access, such as those of one NVLink domain.

    Sends and receives are copies between the GPUs' memories; collectives go through the group. All ranks have to
    construct it at the same time. If memory cannot be shared, the constructor raises; nothing falls back to NCCL.

        cp = df.ContextParallel(df.transport.CopyEngine(dist.group.WORLD))

    Args:
        group: an NCCL group that this rank belongs to.
        timeout: as in `Distributed`.
        room: bytes of a buffer. Each rank has two buffers for each other rank.

    Raises:
        ValueError: the group's tensors are not on GPUs, or two GPUs of the group have no peer-to-peer access.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta | None = None, room: int = 2**24) -> None:
        super().__init__(group, timeout)
        if self.device.type != "cuda":
            raise ValueError("group: expected an NCCL group, got one of CPUs; pass the group itself to ContextParallel")
        self.room = room
        flags = 2 * self.world_size * _SLOTS * _FLAG
        self._memory = _Shared(self, flags + self.world_size * _SLOTS * room)
        self._lanes = {peer: _Lane(self, peer) for peer in range(self.world_size) if peer != self.rank}

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Copies:
        """Start copies on other streams, after all work queued on the current stream."""
        ready = torch.cuda.Event()
        ready.record(current_stream())
        events = []
        for peer, lane in self._lanes.items():
            for messages, move in ((sends, lane.send), (receives, lane.receive)):
                of_peer = [message.tensor for message in messages if message.peer == peer and message.tensor.numel()]
                if of_peer:
                    events.append(move(of_peer, ready))
        return Copies(events, (*receives, *sends))

    def close(self) -> None:
        """End the waits of this GPU, whose peers may be gone, and close the group."""
        for lane in self._lanes.values():
            lane.release()
        super().close()

    def flag(self, owner: int, full: bool, peer: int, slot: int) -> int:
        """The address, for this rank, of a flag in ``owner``'s memory that ``peer`` sets."""
        number = ((0 if full else self.world_size) + peer) * _SLOTS + slot
        return self._memory.addresses[owner] + number * _FLAG

    def buffer(self, owner: int, peer: int, slot: int) -> int:
        """The address, for this rank, of a buffer of ``owner`` for ``peer``."""
        flags = 2 * self.world_size * _SLOTS * _FLAG
        return self._memory.addresses[owner] + flags + (peer * _SLOTS + slot) * self.room


def current_stream() -> torch.cuda.Stream:
    """`torch.cuda.current_stream` of the current device, with less work for the host."""
    stream, device, kind = torch._C._cuda_getCurrentStream(torch.cuda.current_device())
    return torch.cuda.Stream(stream_id=stream, device_index=device, device_type=kind)


class _Shared:
    """Memory of this rank that the other ranks can access, and the addresses of theirs."""

    def __init__(self, ranks: Distributed, size: int) -> None:
        from torch.distributed import _symmetric_memory

        try:
            self.own = _symmetric_memory.empty(size, dtype=torch.uint8, device=ranks.device)
            handle = _symmetric_memory.rendezvous(self.own, ranks.group)
        except RuntimeError as error:
            raise ValueError(
                f"group: GPU memory cannot be shared between these ranks ({' '.join(str(error).split())[:200]}); pass "
                "the process group itself, whose transport is NCCL"
            ) from error
        self.handle = handle  # keeps the mappings
        self.addresses: list[int] = list(handle.buffer_ptrs)
        flags = self.own[: 2 * ranks.world_size * _SLOTS * _FLAG].view(torch.int32)
        flags.zero_()
        flags.view(2, -1)[1].fill_(1)  # all buffers are free
        torch.cuda.synchronize()
        ranks.gather_ints([0])


class _Lane:
    """The connection to one other rank: a stream for each direction, and the index of the next buffer."""

    def __init__(self, ranks: CopyEngine, peer: int) -> None:
        self.ranks, self.peer = ranks, peer
        self.driver = _Driver()
        self.streams = torch.cuda.Stream(), torch.cuda.Stream()
        self.sent = self.received = 0

    def send(self, tensors: Sequence[Tensor], ready: torch.cuda.Event) -> torch.cuda.Event:
        """Fill this rank's buffers, as they become free."""
        ranks, peer, stream = self.ranks, self.peer, self.streams[0]
        stream.wait_event(ready)
        queue, copies = stream.cuda_stream, self.driver
        for address, count in _parts(tensors, ranks.room):
            slot, self.sent = self.sent % _SLOTS, self.sent + 1
            copies.take(queue, ranks.flag(ranks.rank, False, peer, slot))
            copies.copy(queue, ranks.buffer(ranks.rank, peer, slot), address, count)
            copies.set(queue, ranks.flag(peer, True, ranks.rank, slot))
        return stream.record_event()

    def receive(self, tensors: Sequence[Tensor], ready: torch.cuda.Event) -> torch.cuda.Event:
        """Fetch from the peer's buffers, as they become full."""
        ranks, peer, stream = self.ranks, self.peer, self.streams[1]
        stream.wait_event(ready)
        queue, copies = stream.cuda_stream, self.driver
        for address, count in _parts(tensors, ranks.room):
            slot, self.received = self.received % _SLOTS, self.received + 1
            copies.take(queue, ranks.flag(ranks.rank, True, peer, slot))
            copies.copy(queue, address, ranks.buffer(peer, ranks.rank, slot), count)
            copies.set(queue, ranks.flag(peer, False, ranks.rank, slot))
        return stream.record_event()

    def release(self) -> None:
        """Set every flag that this GPU may wait for, until no stream waits. What is copied then is not valid."""
        free = torch.cuda.Stream()
        flags = [self.ranks.flag(self.ranks.rank, full, self.peer, slot) for full in (True, False) for slot in range(2)]
        for _ in range(100_000):
            if all(stream.query() for stream in self.streams):
                return
            for flag in flags:
                self.driver.set(free.cuda_stream, flag)
            free.synchronize()


def _parts(tensors: Sequence[Tensor], room: int) -> Iterator[tuple[int, int]]:
    """The address and length of the part of a tensor that goes into each buffer, in order.

    No buffer holds parts of two tensors, since the other rank may receive them in two exchanges.
    """
    for x in tensors:
        start, size = x.data_ptr(), x.nbytes
        for at in range(0, size, room):
            yield start + at, min(room, size - at)


class _Driver:
    """The driver's calls that queue waits, writes and copies on a stream. Addresses and streams are integers."""

    @cached_property
    def _wait(self) -> Callable[..., int]:
        return driver.function("cuStreamWaitValue32_v2", *_OF_FLAGS)

    @cached_property
    def _write(self) -> Callable[..., int]:
        return driver.function("cuStreamWriteValue32_v2", *_OF_FLAGS)

    @cached_property
    def _copy(self) -> Callable[..., int]:
        return driver.function("cuMemcpyDtoDAsync_v2", *_OF_COPIES)

    def take(self, stream: int, flag: int) -> None:
        """Wait until the flag is set, and reset it."""
        driver.require(self._wait(stream, flag, 1, _EQUAL))
        driver.require(self._write(stream, flag, 0, 0))

    def set(self, stream: int, flag: int) -> None:
        """Set the flag once all earlier copies of the stream are done."""
        driver.require(self._write(stream, flag, 1, 0))

    def copy(self, stream: int, to: int, source: int, count: int) -> None:
        """Copy ``count`` bytes."""
        driver.require(self._copy(to, source, count, stream))
