"""What makes a call, in the two parts in which `torch.compile` takes it: a form, and data.

A graph holds the form as a constant, and is compiled again for another one. The data are inputs of the graph, and one
graph serves all of them: the ints of a mask, the boundaries of documents, and floats that differ from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from distflash.masks import Mask

# A mask's class and what its fields are: a form, a constant, or for data `int`, `Tensor` or `(tuple, length)`.
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
        ints: of the mask in the order of its fields, and how many boundaries each tensor has.
        boundaries: of all documents, one after the other, or None.
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
    boundaries = tensors[0] if len(tensors) == 1 else torch.cat(tensors) if tensors else None
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


def _split(mask: Mask, ints: list[int], tensors: list[Tensor]) -> MaskForm:
    boundaries = getattr(mask, "boundaries", None)
    if boundaries is not None:
        ints.append(boundaries.shape[0])
        tensors.append(boundaries)
        return (type(mask), Tensor)
    form: list[Any] = [type(mask)]
    for value in (getattr(mask, f.name) for f in fields(mask) if f.init):  # type: ignore[arg-type]
        if isinstance(value, Mask):
            form.append(_split(value, ints, tensors))
        elif isinstance(value, tuple) and all(isinstance(v, int) for v in value):
            ints.extend(value)
            form.append((tuple, len(value)))
        elif isinstance(value, int) and not isinstance(value, bool):
            ints.append(value)
            form.append(int)
        else:
            form.append(value)
    return tuple(form)


def _join(form: MaskForm, ints: Iterator[int], boundaries: Iterator[int]) -> Mask:
    kind, *parts = form
    values: list[Any] = []
    for part in parts:
        if part is int:
            values.append(next(ints))
        elif part is Tensor:
            values.append(tuple(next(boundaries) for _ in range(next(ints))))
        elif isinstance(part, tuple) and part and part[0] is tuple:
            values.append(tuple(next(ints) for _ in range(part[1])))
        elif isinstance(part, tuple) and part and isinstance(part[0], type) and issubclass(part[0], Mask):
            values.append(_join(part, ints, boundaries))
        else:
            values.append(part)
    mask: Mask = kind(*values)
    return mask
