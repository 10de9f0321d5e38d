"""The mask that a model asks the library for, as a `Mask`, or the reason why there is none.

A model asks for the masks of all kinds of its layers at the start of its forward, used or not. So a mask that is not
supported is refused by the first layer that is given it, not where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from distflash.integrations.transformers.batch import PASS_ALL, Misuse
from distflash.masks import Causal, Chunked, Full, Mask, Window

_OWN_ATTENTION = (
    "attention: a layer of this model computes on the attention mask itself, so that its attention is not the "
    "library's, which distflash takes the place of. The model is not supported"
)


@dataclass(frozen=True)
class LayerMask:
    """What a layer is given as its mask: either `mask`, or `problem`, the reason why there is none.

    Code that reads it as a tensor is told that this is not supported.
    """

    mask: Mask | None = None
    problem: str | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python, copy, pickle and torch.compile ask of any object
            raise AttributeError(name)
        raise Misuse(self.problem or _OWN_ATTENTION)

    def __getitem__(self, _: Any) -> Any:
        raise Misuse(self.problem or _OWN_ATTENTION)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        raise Misuse(next(x.problem for x in given if isinstance(x, cls)) or _OWN_ATTENTION)


def describe_mask(
    *,
    config: Any,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Mask | str:
    """What the library calls for a mask: the `Mask` of the layers that are given it, or the reason why there is none.

    A plain causal or bidirectional mask is known by its function. One within ``local_size`` keys has a function of its
    own; there the library says that nothing else was laid over it by allowing to skip the mask.
    """
    if kv_length != q_length:
        return (
            f"attention_mask: {kv_length} keys for {q_length} queries; a KV cache is not supported (pass "
            f"use_cache=False), and a mask of the whole sequence has no place here: {PASS_ALL}"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        return f"attention_mask: has zeros; padding is not supported: {PASS_ALL}"
    if local_size is None and mask_function is causal_mask_function:
        return Causal()
    if local_size is None and mask_function is bidirectional_mask_function:
        return Full()
    if use_vmap or not (allow_is_causal_skip or allow_is_bidirectional_skip):
        return (
            "mask: the model lays something over a causal, bidirectional or sliding mask (blocks of images, a mask "
            "function of its own), which is not supported. It also does so where attention_mask was left out of the "
            f"call: {PASS_ALL}"
        )
    if not isinstance(local_size, int) or local_size < 1:
        return f"mask: the model asks for {mask_function!r} within {local_size} keys, which is not supported"
    if local_size == getattr(config, "sliding_window", None):
        # The library's windows count the query among the keys where they are causal, and keys on each side where not.
        return Window(local_size - 1) if allow_is_causal_skip else Window(local_size, local_size)
    if local_size == getattr(config, "attention_chunk_size", None) and allow_is_causal_skip:
        return Causal() & Chunked(local_size)
    return f"mask: the model asks for {mask_function!r} within {local_size} keys, which is not supported"
