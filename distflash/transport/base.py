"""The interface of transports: communication of tensors between ranks. A transport knows nothing of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One contiguous tensor, no view that negates, that is sent to, or received from, another rank.

    Attributes:
        what: what the tensor is, in words, for error messages.
    """

    tensor: Tensor
    peer: int
    what: str = "a message"


class Pending(Protocol):
    """Messages in flight."""

    def wait(self) -> None:
        """After this, received tensors can be read, and sent ones overwritten (on GPUs: on the current stream)."""
        ...


class PointToPoint(Protocol):
    """Point-to-point messages. Between two ranks they are received in the order in which they are sent."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start sends and receives, and return at once. The tensors must not be touched until `Pending.wait`."""
        ...


class Transport(PointToPoint, Protocol):
    """Communication between the ranks of a group, which are numbered from 0 to ``world_size - 1``."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors, and of the collective behind `gather_ints`."""
        ...

    def supports_device(self, device: torch.device) -> bool:
        """Whether tensors on ``device`` can be sent."""
        ...

    @property
    def verifies_every_call(self) -> bool:
        """Whether `gather_ints` is cheap enough to compare every call over the ranks, not only new signatures."""
        ...

    @property
    def intra_node(self) -> bool:
        """Whether all ranks are on one host, where an exchange takes much less time than a pass."""
        ...

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values (int64, equally many on each rank), by rank. All ranks must call."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor, by rank; shapes may differ in any dimension. All ranks must call."""
        ...

    def gather_equal(self, x: Tensor) -> Tensor:
        """``[W, ...]``: every rank's tensor of this shape, by rank, without a synchronisation. All ranks must call."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor. All ranks must call."""
        ...
