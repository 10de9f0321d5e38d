"""Dictionary keys that are equal only for the same value: ``1``, ``1.0`` and ``True`` differ, and NaN equals itself."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import lru_cache
from hashlib import blake2b
from numbers import Integral
from typing import Any


def exact(value: object) -> object:
    """A hashable key of ``value``: the same in every process for the same value, and different for any other value.

    The key of a dataclass consists of its fields, that of another object is its repr, or its class if it has no repr.
    """
    kind = type(value)
    if kind is int or kind is str or value is None:
        return value
    if kind is tuple:
        return value if {*map(type, value)} <= {int} else (tuple, *map(exact, value))  # type: ignore[call-overload]
    if is_dataclass(value) and not isinstance(value, type):
        return (kind, *(exact(getattr(value, f.name)) for f in fields(value) if f.compare))
    if isinstance(value, Integral) and kind is not bool:
        return int(value)
    # The default repr of an object has its address, which differs between processes.
    return (kind, None if kind.__repr__ is object.__repr__ else repr(value))


class ByValue:
    """A value as a key, equal only to the same value. Its hash is computed once; identity is tried first."""

    def __init__(self, value: Any) -> None:
        self.value, self.key = value, exact(value)
        self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ByValue) and self.key == other.key)


class ByIdentity:
    """A value as a key, equal only to the very same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value


def code(value: object) -> int:
    """An int64 for ``value``: itself if it is an int that fits, else a digest, which is negative."""
    key = exact(value)
    return key if isinstance(key, int) and 0 <= key < 2**63 else _digest(key)


@lru_cache(1024)
def _digest(key: object) -> int:
    return ~int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest(), "big")
