"""What makes a call, in the two parts in which `torch.compile` takes it: a form, and data.

A graph holds the form as a constant, and is compiled again for another one. The data are inputs of the graph, and one
graph serves all of them: the ints of a mask, tensors of ints, and floats that differ from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from distflash.integers import require_integers
from distflash.masks import Mask

# A mask's class and what its fields are: a form, `(tuple, *forms)`, a constant, or for data `int`, `Tensor` or
# `(tuple, length)`.
MaskForm = tuple[Any, ...]


class Form(NamedTuple):
    """What a graph holds.

    Attributes:
        mask: see `MaskForm`.
        numbers: ``(scale, softcap, dropout_p)``, or None where they are data.
        scaled: whether a scale was given.
    """

    mask: MaskForm
    numbers: tuple[float | None, float, float] | None
    scaled: bool


class Data(NamedTuple):
    """What a graph is given, in the types that an op takes.

    Attributes:
        ints: of the mask in the order of its fields, and how many each tensor holds.
        boundaries: what the tensors hold, one after the other, int64 if they are several, or None.
        numbers: float64 ``[3]``, scale, softcap and dropout_p, or None where the form has them.
    """

    ints: Sequence[int]
    boundaries: Tensor | None
    numbers: Tensor | None


NO_DATA = Data([], None, None)


def split(mask: Mask, scale: float | None, softcap: float, dropout_p: float) -> tuple[Form, Data]:
    """A call's form and data. Runs while a function is compiled."""
    ints: list[int] = []
    tensors: list[Tensor] = []
    form = _split(mask, ints, tensors)
    boundaries = None if not tensors else tensors[0] if len(tensors) == 1 else _cat(tensors)
    numbers = (scale, softcap or 0.0, dropout_p or 0.0)  # the defaults, too, are symbols under dynamic=True
    if all(x is None or has_static_value(x) for x in numbers):
        return Form(form, numbers, scale is not None), Data(ints, boundaries, None)
    # A product, because it is how the compiler turns a float into data; it would compile full() again for each value.
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    as_data = torch.cat([one * (0.0 if x is None else x) for x in numbers])
    return Form(form, None, scale is not None), Data(ints, boundaries, as_data)


def join(form: Form, data: Data) -> tuple[Mask, float | None, float, float]:
    """The inverse of `split`. Runs when the graph does.

    Raises:
        ValueError: what a mask's class says of wrong values.
    """
    parts = iter(data.ints)
    boundaries = [] if data.boundaries is None else data.boundaries.tolist()
    mask = _join(form.mask, parts, iter(boundaries))
    if data.numbers is None:
        assert form.numbers is not None
        return mask, *form.numbers
    scale, softcap, dropout_p = data.numbers.tolist()
    return mask, scale if form.scaled else None, softcap, dropout_p


def _cat(tensors: list[Tensor]) -> Tensor:
    """Made in the graph on a GPU, or before on the CPU: the call reads them on the CPU."""
    if any(x.device != tensors[0].device for x in tensors):
        tensors = [x.to("cpu") for x in tensors]
    return torch.cat([x.to(torch.int64) for x in tensors])


def _split(mask: Mask, ints: list[int], tensors: list[Tensor]) -> MaskForm:
    values = mask.graph_inputs
    if values is None:
        values = tuple(getattr(mask, f.name) for f in fields(mask) if f.init)  # type: ignore[arg-type]
    return (type(mask), *(_split_value(value, ints, tensors) for value in values))


def _split_value(value: Any, ints: list[int], tensors: list[Tensor]) -> Any:
    if isinstance(value, Mask):
        return _split(value, ints, tensors)
    if isinstance(value, Tensor):
        require_integers(value, "mask: a tensor in a field under torch.compile")
        ints.append(value.shape[0])
        tensors.append(value)
        return Tensor
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        ints.extend(value)
        return (tuple, len(value))
    if isinstance(value, tuple) and all(isinstance(v, Mask) for v in value):
        return (tuple, *(_split(v, ints, tensors) for v in value))
    if isinstance(value, int) and not isinstance(value, bool):
        ints.append(value)
        return int
    return value


def _join(form: MaskForm, ints: Iterator[int], boundaries: Iterator[int]) -> Mask:
    kind, *parts = form
    mask: Mask = kind(*(_join_value(part, ints, boundaries) for part in parts))
    return mask


def _join_value(part: Any, ints: Iterator[int], boundaries: Iterator[int]) -> Any:
    if part is int:
        return next(ints)
    if part is Tensor:
        return tuple(next(boundaries) for _ in range(next(ints)))
    if not (isinstance(part, tuple) and part and isinstance(part[0], type)):
        return part
    if issubclass(part[0], Mask):
        return _join(part, ints, boundaries)
    if part[0] is not tuple:
        return part
    if isinstance(part[1], int):
        return tuple(next(ints) for _ in range(part[1]))
    return tuple(_join(form, ints, boundaries) for form in part[1:])
