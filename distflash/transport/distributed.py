"""Transport over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.transport.base import Message

# How long the compute stream waits after an exchange is posted, in cycles of a GPU: about 9 us.
HEAD_START = 2**14


# The name since torch 2.13, in which the old one is deprecated.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
# `Work.wait` reads 0 as the group's own timeout.
_GROUPS_OWN = timedelta(0)
# Tensors of a collective of up to this many bytes are kept until the next one.
_KEPT = 2**20
# The tag of a receive that is to time out: no message has it.
_NEVER_SENT = 2**20


class InFlight(Protocol):
    """An exchange in flight, which can say what it waits for."""

    @property
    def works(self) -> Sequence[object]:
        """The handles to wait for."""
        ...

    def wait(self) -> None: ...

    def describe(self) -> str:
        """What is waited for, in words."""
        ...


@dataclass
class Works:
    """Handles of one exchange. They keep the tensors alive until `wait`, so that their memory is not reused before."""

    works: Sequence[dist.Work]
    receives: Sequence[Message]
    sends: Sequence[Message]
    timeout: timedelta
    waits_for: int = 0

    def wait(self) -> None:
        """Wait for all messages in order, receives first. On GPUs the current stream waits, and the host does not.

        Raises:
            RuntimeError: a peer is gone, or the timeout has passed.
        """
        for number, work in enumerate(self.works):
            self.waits_for = number
            work.wait(self.timeout)

    def describe(self) -> str:
        """The message that is waited for, or whose wait has failed."""
        message = (*self.receives, *self.sends)[self.waits_for]
        received = self.waits_for < len(self.receives)
        return f"{message.what} from rank {message.peer}" if received else f"rank {message.peer} to take {message.what}"


class Distributed:
    """The ranks of a `torch.distributed` process group, or of a one-dimensional DeviceMesh.

    Args:
        group: a group that this rank belongs to.
        timeout: of one wait; None for the group's own timeout. On GPUs the host does not wait for messages: see
            `distflash.transport.guarded`.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta | None = None) -> None:
        self.group = group
        self.timeout = timeout
        self._kept: tuple[Tensor, ...] = ()
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        # "nccl", "gloo", or one for each kind of device such as "cpu:gloo,cuda:nccl".
        self._backends = dist.get_backend_config(group)
        self.device = _gpu() if "nccl" in self._backends else torch.device("cpu")
        self.verifies_every_call = self.device.type == "cpu"
        # Launchers number ranks host by host, one for each GPU. If they do not, calls are only slower.
        gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        self.intra_node = gpus > 0 and len({rank // gpus for rank in self.members}) == 1

    @property
    def members(self) -> tuple[int, ...]:
        """The global ranks of this group's ranks."""
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def store(self) -> dist.Store:
        """A key-value store that all ranks of the group can read and write."""
        return self.group.get_group_store()

    def within(self, timeout: timedelta | None) -> Distributed:
        """The same ranks with another timeout."""
        other = copy(self)
        other.timeout = timeout
        return other

    def supports_device(self, device: torch.device) -> bool:
        return ("nccl" if device.type == "cuda" else "gloo") in self._backends

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> InFlight:
        """Start sends and receives as one batch, which NCCL runs as one kernel on its own stream."""
        messages = *receives, *sends
        if not messages:
            return Works((), (), (), _GROUPS_OWN)
        if not messages[0].tensor.is_cuda:
            return Works(self._one_by_one(sends, receives), receives, sends, self._limit(messages[0].tensor))
        work = self._as_one(sends, receives)
        # A persistent grid launched first occupies every SM and delays NCCL's kernel until it finishes.
        torch.cuda._sleep(HEAD_START)
        return Works((work,), receives, sends, _GROUPS_OWN)

    def _one_by_one(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        # Receives first: gloo matches messages as they arrive.
        ops = [
            dist.P2POp(operation, message.tensor, group=self.group, group_peer=message.peer)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for message in messages
        ]
        return dist.batch_isend_irecv(ops)

    def _as_one(self, sends: Sequence[Message], receives: Sequence[Message]) -> dist.Work:
        """`batch_isend_irecv` for NCCL without its checks of every message, which cost the host as much as the rest."""
        device = self.device
        self.group._start_coalescing(device)
        for message in receives:
            self.group.recv([message.tensor], message.peer, 0)
        for message in sends:
            self.group.send([message.tensor], message.peer, 0)
        return self.group._end_coalescing(device)

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        local = torch.tensor(values, dtype=torch.int64, device=self.device)
        return [of_rank.tolist() for of_rank in self._all_gather_equal(local)]

    def all_gather(self, x: Tensor) -> list[Tensor]:
        shapes = self.gather_ints(x.shape)
        numel = max(torch.Size(shape).numel() for shape in shapes)
        flat = x.new_zeros(numel)
        flat[: x.numel()] = x.flatten()
        parts = self._all_gather_equal(flat)
        return [p[: torch.Size(s).numel()].view(s) for p, s in zip(parts, shapes, strict=True)]

    def gather_equal(self, x: Tensor) -> Tensor:
        flat = x.flatten()
        parts = x.new_empty(self.world_size * len(flat))  # gloo takes no other shape
        self._finish(_ALL_GATHER(parts, flat, group=self.group, async_op=True), flat, parts)
        return parts.view(self.world_size, *x.shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.to(self.device, copy=True)
        self._finish(dist.all_reduce(total, group=self.group, async_op=True), total)
        return total.to(x.device)

    def mark(self) -> Callable[[], bool] | None:
        """A function that tells whether work queued on the GPU so far is done; None on CPUs and in graph capture."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event()
        event.record()
        return event.query

    def close(self) -> None:
        """End all communication of the group, here and on ranks that wait for this one. It is unusable afterwards."""
        if "nccl" in self._backends:
            self.group.abort()
        if "gloo" in self._backends:
            # gloo has no call that closes a group's connections, but does so when a wait of one of its ranks times out.
            for peer in range(self.world_size):
                with suppress(RuntimeError, ValueError):  # its connection is closed already, or it is this rank
                    never = dist.irecv(torch.empty(1), group=self.group, group_src=peer, tag=_NEVER_SENT)
                    assert never is not None
                    never.wait(timedelta(milliseconds=1))

    def _all_gather_equal(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        self._finish(dist.all_gather(parts, x, group=self.group, async_op=True), x, *parts)
        return parts

    def _finish(self, work: dist.Work | None, *tensors: Tensor) -> None:
        assert work is not None, "this rank belongs to the group"
        work.wait(self._limit(tensors[0]))
        # A thread of gloo releases its references to tensors some time later. If they were the last references, the
        # thread would need Python's lock, and the process would abort if Python is exiting.
        small = sum(x.nbytes for x in tensors) <= _KEPT
        self._kept = tensors if small and tensors[0].device.type == "cpu" else ()

    def _limit(self, x: Tensor) -> timedelta:
        """The timeout of a wait for ``x``. On GPUs the group's own, since another one would make the host wait."""
        return _GROUPS_OWN if self.timeout is None or x.device.type == "cuda" else self.timeout


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
