"""Calls like one before, which layers and steps make: they are checked, and looked up part by part, once.

A key has all that the checks of `attention` read, and all that a call is prepared by. So what was prepared for a call
that passed the checks is right for every call with the same key.
"""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distflash.call import Prepared
from distflash.layouts import Layout
from distflash.mask_algebra import Mask
from distflash.ops import is_watched

Key = tuple[object, ...]
# By keys. The mask and the layout of the first call are kept, because its key has their `id`.
Repeats = dict[Key, tuple[Prepared, Mask, Layout]]

_INTS = {int, NoneType}
_FLOATS = {float, int, NoneType}
_KEPT = 16  # calls of a group, each with a plan, whose intervals are in device memory


def key_of(
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Mask,
    layout: Layout,
    lengths: tuple[int | None, int, int | None],
    numbers: tuple[float | Tensor | None, float | Tensor | None, float],
    max_logits: bool,
) -> Key | None:
    """The key of a call without further tensors; None for a call that has to be checked.

    Args:
        tensors: q, k and v.
        layout: of the `ContextParallel`.
        lengths: ``seq_len, q_start, q_len``.
        numbers: ``scale, softcap, dropout_p``.
        max_logits: whether the largest scores are returned.
    """
    q, k, v = tensors
    if q is None or k is None or v is None or is_watched(q, k, v) or forward_ad._current_level >= 0:
        return None
    if q.is_nested or k.is_nested or v.is_nested:
        return None
    # True equals 1, and a tensor may change.
    if not (_INTS.issuperset(map(type, lengths)) and _FLOATS.issuperset(map(type, numbers))):
        return None
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    of_q = q.shape, q.dtype, q.device, q.layout
    of_k = k.shape, k.dtype, k.device, k.layout
    of_v = v.shape, v.dtype, v.device, v.layout
    return of_q, of_k, of_v, id(mask), id(layout), lengths, numbers, bool(max_logits), needs_grad


def remember(repeats: Repeats, key: Key, prepared: Prepared, mask: Mask, layout: Layout) -> None:
    """Keep what was prepared for a call that has passed the checks."""
    if len(repeats) >= _KEPT:
        repeats.clear()
    repeats[key] = prepared, mask, layout
