"""Transport over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.transport.base import Message

HEAD_START = 2**14  # cycles of a GPU, about 9 us


@dataclass(frozen=True)
class _Works:
    """Handles of one batch. They and their tensors are kept until `wait`, which NCCL needs to reuse memory safely."""

    works: list[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class Distributed:
    """The ranks of a `torch.distributed` process group, or of a one-dimensional DeviceMesh."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
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

    def carries(self, device: torch.device) -> bool:
        return ("nccl" if device.type == "cuda" else "gloo") in self._backends

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Works:
        """Point to point, one batch: NCCL then runs all of it as one kernel on its own stream."""
        # Receives first: gloo matches them as they arrive, and NCCL does not care within a batch.
        ops = [
            dist.P2POp(operation, message.tensor, group=self.group, group_peer=message.peer)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for message in messages
        ]
        works = dist.batch_isend_irecv(ops) if ops else []
        if works and self.device.type == "cuda":
            # A grid as large as the GPU that begins before NCCL's kernel keeps it out until it ends.
            torch.cuda._sleep(HEAD_START)
        return _Works(works)

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

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(x.device)

    def _all_gather_equal(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x, group=self.group)
        return parts


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
