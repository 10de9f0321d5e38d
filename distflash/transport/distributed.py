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

HEAD_START = 2**14  # cycles of a GPU, about 9 us


# The name of 2.13, from which on the other one warns.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
# What `Work.wait` takes for the group's own timeout.
_GROUPS_OWN = timedelta(0)
# Of tensors of a collective that are kept until the next one, in bytes.
_KEPT = 2**20
# No message that is meant to arrive has this tag.
_NEVER_SENT = 2**20


class UnderWay(Protocol):
    """An exchange that says what it waits for."""

    @property
    def works(self) -> Sequence[object]:
        """What there is to wait for."""
        ...

    def wait(self) -> None: ...

    def describe(self) -> str:
        """What is waited for, in words."""
        ...


@dataclass
class Works:
    """Handles of one batch. They and their tensors are kept until `wait`, which NCCL needs to reuse memory safely."""

    works: Sequence[dist.Work]
    receives: Sequence[Message]
    sends: Sequence[Message]
    timeout: timedelta
    waits_for: int = 0

    def wait(self) -> None:
        """Wait for one message after the other, the received ones first. On GPUs the host does not wait.

        Raises:
            RuntimeError: a peer is gone, or the deadline has passed.
        """
        for number, work in enumerate(self.works):
            self.waits_for = number
            work.wait(self.timeout)

    def describe(self) -> str:
        """What is waited for at the moment, or was when the wait failed."""
        message = (*self.receives, *self.sends)[self.waits_for]
        received = self.waits_for < len(self.receives)
        return f"{message.what} from rank {message.peer}" if received else f"rank {message.peer} to take {message.what}"


class Distributed:
    """The ranks of a `torch.distributed` process group, or of a one-dimensional DeviceMesh.

    Args:
        group: this rank belongs to it.
        timeout: how long one wait may last; None for the group's own timeout. On GPUs the host waits for no message:
            see `distflash.transport.guarded`.
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
        self.checks_every_call = self.device.type == "cpu"
        # Launchers number ranks host by host, one a GPU. Where they do not, only time is lost.
        gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        self.near = gpus > 0 and len({rank // gpus for rank in self.members}) == 1

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of this group by their numbers in the default group."""
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def store(self) -> dist.Store:
        """What all ranks of the group can read and write."""
        return self.group.get_group_store()

    def within(self, timeout: timedelta | None) -> Distributed:
        """The same ranks with another timeout."""
        other = copy(self)
        other.timeout = timeout
        return other

    def carries(self, device: torch.device) -> bool:
        return ("nccl" if device.type == "cuda" else "gloo") in self._backends

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> UnderWay:
        """Point to point, one batch: NCCL then runs all of it as one kernel on its own stream."""
        messages = *receives, *sends
        if not messages:
            return Works((), (), (), _GROUPS_OWN)
        if not messages[0].tensor.is_cuda:
            return Works(self._one_by_one(sends, receives), receives, sends, self._limit(messages[0].tensor))
        work = self._as_one(sends, receives)
        # A grid as large as the GPU that begins before NCCL's kernel keeps it out until it ends.
        torch.cuda._sleep(HEAD_START)
        return Works((work,), receives, sends, _GROUPS_OWN)

    def _one_by_one(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        # Receives first: gloo matches them as they arrive.
        ops = [
            dist.P2POp(operation, message.tensor, group=self.group, group_peer=message.peer)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for message in messages
        ]
        return dist.batch_isend_irecv(ops)

    def _as_one(self, sends: Sequence[Message], receives: Sequence[Message]) -> dist.Work:
        """What `batch_isend_irecv` does for NCCL, without its checks of every message, which cost the host as much."""
        device = self.device
        self.group._start_coalescing(device)
        for message in receives:
            self.group.recv([message.tensor], message.peer, 0)
        for message in sends:
            self.group.send([message.tensor], message.peer, 0)
        return self.group._end_coalescing(device)

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        return [theirs.tolist() for theirs in self._all_gather_equal(mine)]

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
        """A question whether all that was queued on the device until now is done; None where the host has waited."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event()
        event.record()
        return event.query

    def close(self) -> None:
        """End what is under way, here and on all ranks that wait for this one; the group is of no use afterwards."""
        if "nccl" in self._backends:
            self.group.abort()
        if "gloo" in self._backends:
            # gloo closes all connections of a group when a wait of one of its ranks times out. It has no call for that.
            for peer in range(self.world_size):
                with suppress(RuntimeError, ValueError):  # a connection to it is closed already, or it is this rank
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
        # A thread of gloo lets go of its tensors when it gets round to it. If they had no other owner by then, it would
        # need Python for that, and Python that is about to exit ends the whole process with an abort.
        small = sum(x.nbytes for x in tensors) <= _KEPT
        self._kept = tensors if small and tensors[0].device.type == "cpu" else ()

    def _limit(self, x: Tensor) -> timedelta:
        """How long the host may wait for ``x``. A wait for a GPU's takes no time, and with a limit it would."""
        return _GROUPS_OWN if self.timeout is None or x.device.type == "cuda" else self.timeout


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
