"""Moving tensors between the ranks of one ring. A transport knows nothing of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One contiguous tensor to, or from, one other rank.

    Attributes:
        what: what the tensor is, for the words of an error.
    """

    tensor: Tensor
    peer: int
    what: str = "a message"


class Pending(Protocol):
    """Messages in flight."""

    def wait(self) -> None:
        """Make what is computed next see the received tensors, and be free to overwrite the sent ones."""
        ...


class Exchanges(Protocol):
    """Point-to-point messages. Between two ranks they arrive in the order in which they were sent."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start sending and receiving; returns at once. The tensors must stay as they are until `Pending.wait`."""
        ...


class Transport(Exchanges, Protocol):
    """How the ranks of a ring reach one another. Peers are ranks of the ring, from 0 to ``world_size - 1``."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors are expected to be, and what `gather_ints` goes through."""
        ...

    def carries(self, device: torch.device) -> bool:
        """Whether tensors on ``device`` can be sent."""
        ...

    @property
    def checks_every_call(self) -> bool:
        """Whether `gather_ints` is cheap enough to compare notes at every call, not only at a new signature."""
        ...

    @property
    def near(self) -> bool:
        """Whether all ranks are on one host, where keys travel much faster than they are worked on."""
        ...

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values (int64, equally many on each rank), by rank. All ranks must call."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor, by rank; shapes may differ in any dimension. All ranks must call."""
        ...

    def gather_equal(self, x: Tensor) -> Tensor:
        """``[W, ...]``: every rank's tensor of this shape, by rank, without waiting for the device. All must call."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor. All ranks must call."""
        ...
