"""A call under `torch.compile`, in two parts: its form and its data.

The form is a constant of the graph, which is compiled again for another form. The data are inputs of the graph, so one
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
from distflash.layouts import Layout
from distflash.mask_algebra import Mask

# The class of a mask or layout, and for each of its fields: a form, `(tuple, *forms)`, a constant, or for data `int`,
# `Tensor` or `(tuple, length)`.
ClassForm = tuple[Any, ...]


class Form(NamedTuple):
    """The constant part of a call.

    Attributes:
        mask: see `ClassForm`.
        numbers: ``(scale, softcap, dropout_p)``, or None if they are data.
        scaled: whether a scale was passed.
        kv_layout, layout: see `ClassForm`; a layout without fields is itself the form.
        max_logits: see `Options`.
    """

    mask: ClassForm
    numbers: tuple[float | None, float, float] | None
    scaled: bool
    kv_layout: ClassForm | Layout | None = None
    layout: ClassForm | Layout | None = None
    max_logits: bool = False


class Data(NamedTuple):
    """The inputs of a graph, in types that an op takes.

    Attributes:
        ints: the ints of the mask and the layout in the order of their fields, and the length of each tensor.
        boundaries: the tensors, concatenated; int64 if there are several; None if there are none.
        numbers: float64 ``[3]``, scale, softcap and dropout_p, or None if they are in the form.
    """

    ints: Sequence[int]
    boundaries: Tensor | None
    numbers: Tensor | None


NO_DATA = Data([], None, None)


def split(
    mask: Mask,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    kv_layout: Layout | None = None,
    layout: Layout | None = None,
    max_logits: bool = False,
) -> tuple[Form, Data]:
    """A call's form and data. Runs while a function is compiled.

    Raises:
        ValueError: the values of a field cannot be inputs of the graph.
    """
    ints: list[int] = []
    tensors: list[Tensor] = []
    form = _split(mask, ints, tensors)
    of_keys, own = (None if x is None else _split_layout(x, ints, tensors) for x in (kv_layout, layout))
    boundaries = None if not tensors else tensors[0] if len(tensors) == 1 else _cat(tensors)
    numbers = (scale, softcap or 0.0, dropout_p or 0.0)  # the defaults, too, are symbols under dynamic=True
    if all(x is None or has_static_value(x) for x in numbers):
        return Form(form, numbers, scale is not None, of_keys, own, max_logits), Data(ints, boundaries, None)
    # A product makes the compiler treat a float as data; with full() it would compile again for each value.
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    as_data = torch.cat([one * (0.0 if x is None else x) for x in numbers])
    return Form(form, None, scale is not None, of_keys, own, max_logits), Data(ints, boundaries, as_data)


def join(form: Form, data: Data) -> tuple[Mask, float | None, float, float, Layout | None, Layout | None]:
    """The inverse of `split`. Runs when the graph runs.

    Raises:
        ValueError: raised by the class of a mask or a layout for wrong values.
    """
    parts = iter(data.ints)
    boundaries = iter([] if data.boundaries is None else data.boundaries.tolist())
    mask = _join(form.mask, parts, boundaries)
    kv_layout, layout = (
        _join(each, parts, boundaries) if isinstance(each, tuple) else each for each in (form.kv_layout, form.layout)
    )
    if data.numbers is None:
        assert form.numbers is not None
        return mask, *form.numbers, kv_layout, layout
    scale, softcap, dropout_p = data.numbers.tolist()
    return mask, scale if form.scaled else None, softcap, dropout_p, kv_layout, layout


def _cat(tensors: list[Tensor]) -> Tensor:
    """The tensors, concatenated; on the CPU if their devices differ, where the call reads them."""
    if any(x.device != tensors[0].device for x in tensors):
        tensors = [x.to("cpu") for x in tensors]
    return torch.cat([x.to(torch.int64) for x in tensors])


def _split(mask: Mask, ints: list[int], tensors: list[Tensor]) -> ClassForm:
    if mask.graph_inputs is not None:
        return (type(mask), *(_split_value(value, ints, tensors) for value in mask.graph_inputs))
    return _split_fields(mask, ints, tensors)


def _split_layout(layout: Layout, ints: list[int], tensors: list[Tensor]) -> ClassForm | Layout:
    """By fields, since the compiler loses the fields of an object that is made in a compiled function."""
    kind = type(layout)
    if "__dataclass_fields__" in kind.__dict__:
        return _split_fields(layout, ints, tensors)
    if "__init__" in kind.__dict__:
        raise ValueError(
            f"kv_layout: under torch.compile expected a frozen dataclass, whose fields the graph is given, got a "
            f"{kind.__name__}"
        )
    return layout


def _split_fields(value: Any, ints: list[int], tensors: list[Tensor]) -> ClassForm:
    values = tuple(getattr(value, f.name) for f in fields(value) if f.init)
    return (type(value), *(_split_value(each, ints, tensors) for each in values))


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


def _join(form: ClassForm, ints: Iterator[int], boundaries: Iterator[int]) -> Any:
    kind, *parts = form
    return kind(*(_join_value(part, ints, boundaries) for part in parts))


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
