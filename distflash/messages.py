"""Messages of the agreement: a rank's call as a row of integers, and what is wrong if the ranks' rows differ.

All rows have the same width for all kinds of calls, because a collective of different widths would abort the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distflash.exact import code

FORWARD, BACKWARD = "attention forward", "attention backward"

FIELDS = 32
_WORDS, _BYTES = 6, 7  # a kind of call is words of so many bytes, which fit an int64
WIDTH = 3 + _WORDS + FIELDS


@dataclass(frozen=True)
class Message:
    """A rank's row.

    Attributes:
        refuses: whether this rank raises because of its own arguments.
        number: the call's number among those of its kind, 0 for none.
        names: a digest of the full kind and of the fields' names; 0 if the rank refuses.
        kind: the kind of call, in words.
        codes: the values of the fields, see `exact.code`.
    """

    refuses: bool
    number: int
    names: int
    kind: str
    codes: tuple[int, ...] = ()

    @staticmethod
    def about(kind: str, fields: Mapping[str, object], number: int) -> Message:
        if len(fields) > FIELDS:
            raise ValueError(f"fields: {len(fields)} are more than the {FIELDS} that are compared at once")
        return Message(False, number, code((kind, *fields)), kind, tuple(map(code, fields.values())))

    @staticmethod
    def refusing(kind: str, number: int) -> Message:
        return Message(True, number, 0, kind)

    def packed(self) -> list[int]:
        text = self.kind.encode()[: _WORDS * _BYTES].ljust(_WORDS * _BYTES, b"\0")
        words = [int.from_bytes(text[n : n + _BYTES], "big") for n in range(0, len(text), _BYTES)]
        codes = [*self.codes, *[0] * (FIELDS - len(self.codes))]
        return [int(self.refuses), self.number, self.names, *words, *codes]

    @staticmethod
    def unpacked(row: Sequence[int]) -> Message:
        text = b"".join(word.to_bytes(_BYTES, "big") for word in row[3 : 3 + _WORDS])
        kind = text.rstrip(b"\0").decode(errors="replace")
        return Message(bool(row[0]), row[1], row[2], kind, tuple(row[3 + _WORDS :]))

    @property
    def call(self) -> str:
        return self.kind + (f" of call {self.number}" if self.number else "")


def difference(messages: Sequence[Message], rank: int, fields: Mapping[str, object]) -> str | None:
    """What is wrong, for this rank, with what all ranks have said; None if they agree.

    Args:
        messages: every rank's.
        rank: this rank.
        fields: what this rank's message was made of.
    """
    calls = {message.call: [r for r, m in enumerate(messages) if m.call == message.call] for message in messages}
    different = ", ".join(f"{_ranks(ranks)} the {call}" for call, ranks in calls.items())
    refusing = [r for r, message in enumerate(messages) if message.refuses]
    if refusing:
        return (
            f"{_ranks(refusing)} refused this call because of its own arguments and raised the reason; this rank, "
            f"{rank}, stops with it so that nobody waits" + (f". The calls differ: {different}" * (len(calls) > 1))
        )
    if len(calls) > 1:
        return (
            f"the ranks of this context-parallel group make different calls: {different}. This is rank {rank}. All "
            "ranks have to make the same calls in the same order, forward and backward"
        )
    if len({message.names for message in messages}) > 1:
        names = ", ".join(fields)
        return f"fields: the ranks compare {messages[rank].call} by different names; rank {rank} has {names}"
    found = [_field(n, name, mine, messages) for n, (name, mine) in enumerate(fields.items())]
    if not any(found):
        return None
    left_out = any(problem.startswith("seq_len is") for problem in found)
    return (
        f"the ranks of this context-parallel group disagree about the {messages[rank].call}: "
        + "; ".join(filter(None, found))
        + f". This is rank {rank}. All ranks have to give the same"
        + "; where they hold unequal numbers of tokens, pass seq_len=, the length of the whole sequence" * left_out
    )


def _field(n: int, name: str, mine: object, messages: Sequence[Message]) -> str:
    """How a field differs between the ranks; empty if it does not."""
    codes = [message.codes[n] for message in messages]
    if len(set(codes)) == 1:
        return ""
    if min(codes) >= 0:
        return f"{name} is " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(codes))
    groups = [[rank for rank, value in enumerate(codes) if value == kind] for kind in dict.fromkeys(codes)]
    return f"{name} differs between " + " and ".join(map(_ranks, groups)) + f" (here it is {_short(mine)})"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = list(map(str, ranks))
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(numbers)


def _short(value: object) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:100] + " ..." + text[-16:]
