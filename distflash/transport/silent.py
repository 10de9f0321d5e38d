"""A transport for one rank of a group without the others: it runs the rank's work, and receives nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.transport.base import Message


class _Nothing:
    def wait(self) -> None:
        return


@dataclass(frozen=True)
class Silent:
    """Received tensors are uninitialised memory; the other ranks agree with every call."""

    rank: int
    world_size: int
    device: torch.device
    verifies_every_call: bool = False
    intra_node: bool = True

    def supports_device(self, device: torch.device) -> bool:
        return True

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Nothing:
        return _Nothing()

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [list(values)] * self.world_size

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x] * self.world_size

    def gather_equal(self, x: Tensor) -> Tensor:
        return x.expand(self.world_size, *x.shape).contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        return x * self.world_size
