"""Reading PTX: under which conditions loads by descriptor begin."""

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
