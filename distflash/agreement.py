"""Ranks that disagree about a call are told so, instead of hanging in it.

Before the first call of every new signature the ranks compare it, field by field: numbers as they are, everything else
by a digest. A difference raises on every rank, with the rank and the field. Later calls of a known signature cost a
set look-up on GPUs; on CPUs, where a comparison is cheap beside the work, every call is compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from distflash.transport import Transport

Signature = tuple[tuple[str, object], ...]

_REFUSED = "arguments"


# Enough for the lengths and masks in use at a time, and a bound where every step brings new documents.
_REMEMBERED = 1024


@dataclass
class Agreement:
    """What the ranks of a transport have agreed on so far."""

    transport: Transport
    _known: set[int] = field(default_factory=set)

    def require(self, signature: Signature) -> None:
        """Compare signatures over all ranks.

        Args:
            signature: ``(field, value)`` pairs, the same fields in the same order on every rank. A value is hashable,
                and an int or anything whose repr says all of it.

        Raises:
            ValueError: on every rank, if any two ranks differ. It names the ranks, the field and the values.
        """
        known = hash(signature) in self._known
        if self.transport.world_size == 1 or (known and not self.transport.checks_every_call):
            return
        rows = self.transport.gather_ints([0, *(_code(value) for _, value in signature)])
        refused = [rank for rank, row in enumerate(rows) if row[0]]
        if refused:
            raise ValueError(
                f"{_ranks(refused)} refused this call because of its own arguments and raised the reason; this rank, "
                f"{self.transport.rank}, stops with it so that nobody waits"
            )
        differences = [_difference(n, name, rows, signature) for n, (name, _) in enumerate(signature, start=1)]
        if any(differences):
            raise ValueError(
                "the ranks of this context-parallel group disagree about one call: "
                + "; ".join(filter(None, differences))
                + f". This is rank {self.transport.rank}. Call attention on every rank with the same batch size, "
                "heads, head dims, dtype, mask, layout and seq_len"
            )
        if len(self._known) >= _REMEMBERED:
            self._known.clear()  # on every rank at the same call, since all have agreed on the same ones
        self._known.add(hash(signature))

    def refuse(self, fields: int) -> None:
        """Tell the other ranks, who may be comparing a signature of ``fields`` fields, that this one will raise.

        Where the others may already be past comparing (GPUs, once anything has been agreed on), nothing is sent.
        """
        if self.transport.world_size > 1 and (self.transport.checks_every_call or not self._known):
            self.transport.gather_ints([1, *(0 for _ in range(fields))])


def _code(value: object) -> int:
    if isinstance(value, int):
        return int(value)
    kind = type(value)
    # The plain repr of an object is its address, which is another on every rank.
    text = f"{kind.__module__}.{kind.__qualname__}" if kind.__repr__ is object.__repr__ else repr(value)
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _difference(n: int, name: str, rows: list[list[int]], signature: Signature) -> str:
    codes = [row[n] for row in rows]
    if len(set(codes)) == 1:
        return ""
    mine = signature[n - 1][1]
    if isinstance(mine, int):
        return f"{name} is " + ", ".join(f"{code} on rank {rank}" for rank, code in enumerate(codes))
    groups = [[rank for rank, code in enumerate(codes) if code == kind] for kind in dict.fromkeys(codes)]
    return f"{name} differs between " + " and ".join(map(_ranks, groups)) + f" (here it is {_short(mine)})"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:100] + " ..." + text[-16:]
