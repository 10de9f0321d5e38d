"""Ranks that disagree about a call are told so, instead of hanging in it or mixing two calls up.

Before a call sends anything, the ranks exchange one message each. It says which kind of call the rank makes, which
number that call has, and what all ranks must have alike: numbers as they are, everything else as a digest. All messages
have one width, so ranks in different kinds of call understand each other. Any difference is a `ValueError` on every
rank.

On CPUs a message is cheap beside the call, so every call is compared, forward and backward. On GPUs only calls with a
new signature are; a known one costs a set look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from distflash.messages import FORWARD, Message, difference
from distflash.transport import Transport

Fields = Mapping[str, object]

# Enough for the lengths and masks in use at a time, and a bound where every step brings new documents.
_REMEMBERED = 256


@dataclass
class Agreement:
    """What the ranks of a transport have agreed on so far.

    Attributes:
        transport: this rank's.
        every_call: whether all calls are compared, or only those with a new signature. The same on all ranks.
        calls: how many attention calls the ranks have made.
    """

    transport: Transport
    every_call: bool
    calls: int = 0
    _known: set[tuple[str, Hashable]] = field(default_factory=set)

    def require(self, kind: str, fields: Callable[[], Fields], *, key: Hashable | None = None, number: int = 0) -> None:
        """Compare a call over all ranks.

        Args:
            kind: what the call is, in words.
            fields: what the ranks compare, by name, the same names on every rank. Called only if they do.
            key: the call's signature. Where not every call is compared, a call whose key is known is not. Values that
                change from step to step, or take long to look at, are in ``fields`` but not in ``key``. None to compare
                in any case.
            number: the call's number among those of its kind.

        Raises:
            ValueError: on every rank, if any two ranks differ or one refuses. It names the ranks, what differs, and the
                kinds of call where they differ.
        """
        if self.transport.world_size == 1:
            return
        remember = key is not None and not self.every_call
        if remember and (kind, key) in self._known:
            return
        self._exchange(kind, fields(), number)
        if not remember:
            return
        if len(self._known) >= _REMEMBERED:
            self._known.clear()  # on every rank at the same call, since all have agreed on the same ones
        self._known.add((kind, key))

    def require_next(self, fields: Callable[[], Fields], key: Hashable) -> int:
        """Compare the forward of the next attention call and return its number. Refused calls have none."""
        number = self.calls + 1
        self.require(FORWARD, fields, key=key, number=number)
        self.calls = number
        return number

    def refuse(self, kind: str, *, sure: bool) -> None:
        """Tell the other ranks, who are comparing, that this one will raise.

        Args:
            kind: the call that this rank refuses.
            sure: whether the others compare their call in any case. If not, nothing is sent once they may know its
                signature (GPUs, as soon as anything has been agreed on): they are then past comparing.
        """
        if self.transport.world_size > 1 and (sure or self.every_call or not self._known):
            number = self.calls + 1 if kind == FORWARD else 0
            self.transport.gather_ints(Message.refusing(kind, number).packed())

    def _exchange(self, kind: str, fields: Fields, number: int) -> None:
        rows = self.transport.gather_ints(Message.about(kind, fields, number).packed())
        problem = difference([Message.unpacked(row) for row in rows], self.transport.rank, fields)
        if problem is not None:
            raise ValueError(problem)
