"""A subset of the ranks of a transport, in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distflash.transport.base import Message, Pending, PointToPoint


@dataclass(frozen=True)
class Subset:
    """Point-to-point messages between the ``members``, which are ranks of ``transport``."""

    transport: PointToPoint
    members: tuple[int, ...]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """As `Transport.exchange`; peers are indices into the members."""
        sends, receives = (
            [replace(message, peer=self.members[message.peer]) for message in messages]
            for messages in (sends, receives)
        )
        return self.transport.exchange(sends, receives)
