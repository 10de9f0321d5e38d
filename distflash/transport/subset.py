"""Some ranks of a transport, in an order of their own, as the ranks of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distflash.transport.base import Exchanges, Message, Pending


@dataclass(frozen=True)
class Subset:
    """What a schedule among ``members`` needs of a transport: point-to-point messages."""

    transport: Exchanges
    members: tuple[int, ...]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """As `Transport.exchange`; peers are places among the members."""
        sends, receives = (
            [replace(message, peer=self.members[message.peer]) for message in messages]
            for messages in (sends, receives)
        )
        return self.transport.exchange(sends, receives)
