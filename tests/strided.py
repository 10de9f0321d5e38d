"""Copies of tensors with other strides, as after slices, transposes and expands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x


def batches_after_tokens(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def dims_not_last(x: Tensor) -> Tensor:
    return x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else x


def shifted(x: Tensor) -> Tensor:
    """At an address that is no multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def part_of(dim: int, before: int, after: int) -> Callable[[Tensor], Tensor]:
    """A slice of a larger tensor, as of a projection that packs queries, keys and values."""

    def part(x: Tensor) -> Tensor:
        d = dim % x.dim()
        around = [x.new_full((*x.shape[:d], n, *x.shape[d + 1 :]), 7.0) for n in (before, after)]
        return torch.cat([around[0], x, around[1]], d).narrow(d, before, x.shape[d])

    return part


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def negated(x: Tensor) -> Tensor:
    """A view whose elements are negated as they are read."""
    return torch._neg_view(-x)


def odd_where_it_does_not_matter(x: Tensor) -> Tensor:
    """The stride of a dimension of size 1 is never used, nor any of an empty tensor's."""
    x = x.contiguous()
    strides = [
        s if n > 1 and x.numel() else 3 + 2 * d for d, (s, n) in enumerate(zip(x.stride(), x.shape, strict=True))
    ]
    return x.as_strided(x.shape, strides)


@dataclass(frozen=True)
class Expanded:
    """One number in place of many that are equal (see `repeat_over`): a stride of 0."""

    dims: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.one(x).clone().expand_as(x) if x.numel() else x

    def one(self, x: Tensor) -> Tensor:
        for dim in self.dims:
            x = x.narrow(dim % x.dim(), 0, 1)
        return x


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "heads first": heads_first,
    "batches after tokens": batches_after_tokens,
    "dims not last": dims_not_last,
    "shifted": shifted,
    "part of a sequence": part_of(1, 2, 3),
    "part of heads": part_of(-2, 1, 2),
    "part of heads, aligned": part_of(-2, 2, 2),
    "odd rows": part_of(-1, 0, 3),
    "every second": every_second,
    "negated": negated,
    "odd where it does not matter": odd_where_it_does_not_matter,
    "expanded batch": Expanded((0,)),
    "expanded tokens": Expanded((1,)),
    "expanded heads": Expanded((-2,)),
    "expanded dims": Expanded((-1,)),
    "expanded batch and heads": Expanded((0, -2)),
    "one number": Expanded((0, 1, -2, -1)),
}


def repeat_over(x: Tensor, strides: str) -> Tensor:
    """``x`` with such equal numbers as these strides need."""
    kind = STRIDES[strides]
    return kind.one(x).expand_as(x).clone() if isinstance(kind, Expanded) and x.numel() else x
