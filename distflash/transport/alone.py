"""The transport of a single rank, which sends nothing."""

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
class Alone:
    """One rank on its own, on any device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    verifies_every_call: bool = False
    intra_node: bool = True

    def supports_device(self, device: torch.device) -> bool:
        return True

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Nothing:
        assert not sends and not receives, "a single rank has no peers"
        return _Nothing()

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [list(values)]

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x]

    def gather_equal(self, x: Tensor) -> Tensor:
        return x[None]

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.clone()
