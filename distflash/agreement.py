"""The agreement of ranks: calls that differ between ranks raise on all of them, instead of hanging or being mixed up.

Before a call sends anything, each rank sends one message to all others. It has the kind of the call, its number, and
the fields that have to be equal on all ranks: integers as they are, everything else as a digest. All messages have the
same width, so ranks in different kinds of call can read each other's. Any difference is a `ValueError` on every rank.

On CPUs a message is cheap compared to the call, so every call is compared, forward and backward. On GPUs only calls
with a new signature are; for a known signature the cost is a set look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from distflash.messages import FORWARD, Message, difference
from distflash.profiling import named
from distflash.transport import Transport

Fields = Mapping[str, object]

# Signatures kept: more than are in use at a time, and a bound for jobs with new documents in every step.
_REMEMBERED = 256


@dataclass
class Agreement:
    """The comparison of calls over the ranks of a transport.

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
            fields: returns what the ranks compare, by name, the same names on every rank. Called only if they compare.
            key: the call's signature. Unless every call is compared, a call with a known key is not. Values that change
                from step to step, or are slow to compute, are in ``fields`` but not in ``key``. None to compare in any
                case.
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
        """Compare the forward of the next attention call, and return its number. Refused calls are not counted."""
        number = self.calls + 1
        self.require(FORWARD, fields, key=key, number=number)
        self.calls = number
        return number

    def refuse(self, kind: str, *, others_compare: bool) -> None:
        """Tell the other ranks, which are comparing their calls, that this rank raises.

        Args:
            kind: the call that this rank refuses.
            others_compare: whether the others compare their call in any case. If not, nothing is sent if they may know
                its signature (on GPUs, after the first agreement), since they then do not compare.
        """
        if self.transport.world_size > 1 and (others_compare or self.every_call or not self._known):
            number = self.calls + 1 if kind == FORWARD else 0
            self.transport.gather_ints(Message.refusing(kind, number).packed())

    def _exchange(self, kind: str, fields: Fields, number: int) -> None:
        with named("agreement"):
            rows = self.transport.gather_ints(Message.about(kind, fields, number).packed())
            problem = difference([Message.unpacked(row) for row in rows], self.transport.rank, fields)
        if problem is not None:
            raise ValueError(problem)
