"""Reading PTX: under which conditions loads by descriptor begin, and what arrivals at barriers wait for."""

from __future__ import annotations

import re
from collections import defaultdict

_STATEMENT = re.compile(r"^\s*(?:@!?(%\w+)\s+)?([a-z]\S*)\s+(.+);", re.MULTILINE)
_RESULT = re.compile(r"\{[^}]*\}|[^,\[]*")  # registers in braces, or all before the first comma
_REGISTER = re.compile(r"%\w+")
_MEMORY = "memory"


def unconditional_loads(ptx: str) -> int:
    """How many loads by descriptor begin whatever there is in memory: their predicate tells one thread from others."""
    made = _sources(ptx)
    predicates = re.findall(r"@(%p\d+) mbarrier\.arrive\.expect_tx", ptx)
    return sum(_MEMORY not in _all_sources(predicate, made) for predicate in predicates)


_GUARD = r"(@!?%\w+\s+)?"
_ARRIVAL = re.compile(_GUARD + r"mbarrier\.arrive\.shared")
_MEETING = re.compile(_GUARD + r"(bar\.sync|bar\.warp\.sync|barrier\.sync)")
_SHARED_MEMORY = re.compile(_GUARD + r"(ld\.shared|st\.shared|wgmma\.|cp\.async)|\$L__BB")


def unordered_arrivals(ptx: str) -> int:
    """How many arrivals by one thread at a barrier may come before other threads are done with shared memory.

    An arrival is in order if all threads that it stands for have met (``bar.sync`` for a warpgroup, ``bar.warp.sync``
    for a warp) after their last access to shared memory: nothing but other arrivals may stand between the two.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    return sum(bool(_ARRIVAL.match(line)) and not _have_met(lines[:n]) for n, line in enumerate(lines))


def _have_met(before: list[str]) -> bool:
    for line in reversed(before):
        if _MEETING.match(line):
            return True
        if _SHARED_MEMORY.match(line):
            return False
    return False


def _sources(ptx: str) -> dict[str, set[str]]:
    """What each register is made of, over all places where it is set."""
    made: dict[str, set[str]] = defaultdict(set)
    for guard, name, operands in _STATEMENT.findall(ptx):
        results = _RESULT.match(operands)[0]
        sources = set(_REGISTER.findall(operands[len(results) :])) | ({guard} if guard else set())
        if name.startswith("ld."):
            sources.add(_MEMORY)
        for result in _REGISTER.findall(results):
            made[result] |= sources
    return made


def _all_sources(register: str, made: dict[str, set[str]]) -> set[str]:
    found, fresh = {register}, [register]
    while fresh:
        further = made.get(fresh.pop(), set()) - found
        found |= further
        fresh += further
    return found
