"""Integers as users pass them, in masks and lengths: kept as Python ints, or refused with what was expected.

Ints may come as numpy's, or as tensors; sequences of them as lists, arrays or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

# Farther than any position: adding it to one, or subtracting it, stays within int64. Larger numbers mean no limit too.
FAR = 2**62


def set_count(mask: object, name: str, *, least: int, hint: str = "") -> None:
    """Keep the field ``name`` as a Python int, whatever kind of integer it came as, or refuse it."""
    value = getattr(mask, name)
    count = as_int(value)
    if count is None or count < least:
        raise ValueError(f"{type(mask).__name__}({name}): expected an int of at least {least}, got {value!r}{hint}")
    if type(value) is not int:
        object.__setattr__(mask, name, count)


def as_int(value: object) -> int | None:
    """A Python int, or what stands for one (numpy's integers, an integer tensor of one element); None for others."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    try:
        return None if _is_bool(value) else index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # a float, a string; a tensor of floats, of several numbers, or without data
        return None


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def as_boundaries(values: Sequence[SupportsIndex] | Tensor, name: str, units: str) -> tuple[int, ...]:
    """Cumulative lengths ``[0, l0, l0 + l1, ..., S]`` as Python ints, without repetitions, or refuse them.

    Args:
        values: the boundaries, with repetitions for what is empty and for padding at the end.
        name: class and field for errors, such as ``"Documents(cu_seqlens)"``.
        units: what lies between two boundaries, such as ``"documents"``.
    """
    ends = as_ints(values, name)
    field_name = name[name.index("(") + 1 : -1]
    if len(ends) < 2 or ends[0] != 0:
        raise ValueError(
            f"{name}: expected at least [0, S], starting at 0, got {_short(ends)}; "
            f"pass cumulative lengths such as [0, 3, 8] for {units} of 3 and 5 tokens"
        )
    for n, (start, stop) in enumerate(pairwise(ends)):
        if stop < start:
            raise ValueError(
                f"{name}: must not decrease, but {field_name}[{n + 1}] = {stop} follows "
                f"{field_name}[{n}] = {start}; pass cumulative lengths, not lengths, and pad by repeating the last"
            )
    if ends[-1] > FAR:
        raise ValueError(f"{name}: expected at most 2**62 tokens, got {ends[-1]}")
    stops = tuple(stop for start, stop in pairwise(ends) if stop > start)
    return (0, *(stops or (0,)))


def as_ints(
    values: Sequence[SupportsIndex] | Tensor, name: str, meaning: str = "cumulative lengths"
) -> tuple[int, ...]:
    """Integers of any kind as Python ints, or refuse them; ``name`` and ``meaning`` are for the errors."""
    if isinstance(values, Tensor):
        require_integers(values, name)
        if values.is_meta:
            raise ValueError(f"{name}: is on meta and holds no numbers; pass a tensor with data")
        return tuple(values.tolist())
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(
            f"{name}: expected whole numbers such as [0, 3, 8], got {values!r}; pass {meaning} "
            "as a sequence, an array or a tensor"
        )
    values = tuple(values)
    ints = tuple(_as_whole(v) for v in values)
    if None in ints:
        raise ValueError(f"{name}: expected whole numbers such as [0, 3, 8], got {_short(values)}")
    return ints  # type: ignore[return-value]


def as_data(
    values: Sequence[SupportsIndex] | Tensor, name: str, meaning: str = "cumulative lengths"
) -> tuple[int, ...] | Tensor:
    """`as_ints` in a function that `torch.compile` compiles, where nothing may depend on values: a tensor stays one.

    When the graph runs, the call makes the mask again of these values, which are then checked.
    """
    if type(values).__module__ == "numpy":
        values = torch.as_tensor(values)
    if isinstance(values, Tensor):
        require_integers(values, name)
        return values
    return as_ints(values, name, meaning)


def as_tensors(*values: tuple[int, ...]) -> tuple[Tensor, ...]:
    """int64 on the CPU: see `Mask.graph_inputs`."""
    return tuple(torch.tensor(value, dtype=torch.int64, device="cpu") for value in values)


def _as_whole(value: object) -> int | None:
    """As `as_int`, and floats that are whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else as_int(value)


def require_integers(values: Tensor, name: str) -> None:
    """Refuse a tensor that is no list of integers, under ``name``."""
    if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected a one-dimensional integer tensor, got {values.dtype} with shape {tuple(values.shape)}"
        )


def _short(values: Sequence[object]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ... {values[-1]}]"
