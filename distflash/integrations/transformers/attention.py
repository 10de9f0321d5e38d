"""Attention as the library's registry takes it: what a layer asks for, checked and handed to `distflash.attention`.

[Note: shapes] B batch, T local tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from distflash.api import ContextParallel, attention
from distflash.integrations.transformers.batch import PASS_ALL, Shard
from distflash.masks import Causal, Documents, Full, Mask, Window

# Layers that mix tokens by attention. Others (convolutions, linear attention) would see this rank's tokens only.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


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
) -> Mask:
    """What the library calls for a mask: the `Mask` of the layers that will be given it.

    The library allows a mask to be skipped if it is plainly causal or plainly bidirectional, within ``local_size`` keys
    if that is given; that it does not allow it is how it says that something else was laid over the mask.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "model: encoder-decoder models are not supported; keys have to be those of the queries' own tokens"
        )
    if others := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        raise ValueError(
            f"model: has layers of type {', '.join(sorted(others))}, which are not supported: they mix tokens by other "
            "means than full or sliding attention, and would see this rank's tokens only"
        )
    if kv_length != q_length:
        raise ValueError(
            f"attention_mask: {kv_length} keys for {q_length} queries; a KV cache is not supported (pass "
            f"use_cache=False), and a mask of the whole sequence has no place here: {PASS_ALL}"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(f"attention_mask: has zeros; padding is not supported: {PASS_ALL}")
    if use_vmap or not (allow_is_causal_skip or allow_is_bidirectional_skip):
        raise ValueError(
            "mask: the model asks for another than causal, bidirectional or sliding ones (blocks of images, a mask "
            f"function of its own), which is not supported; or attention_mask was left out of the call: {PASS_ALL}"
        )
    if local_size is None and mask_function is causal_mask_function:
        return Causal()
    if local_size is None and mask_function is bidirectional_mask_function:
        return Full()
    if local_size is None or local_size != getattr(config, "sliding_window", None):
        raise ValueError(f"mask: the model asks for {mask_function!r}, local_size={local_size}, which is not supported")
    # The library's windows count the query among the keys where they are causal, and keys on each side where not.
    return Window(local_size - 1) if allow_is_causal_skip else Window(local_size, local_size)


# Keywords that layers pass on, and what they mean here. All others would be dropped in silence, so they are refused.
_HARMLESS = {"is_causal", "sliding_window", "shift_labels", "num_items_in_batch", "output_hidden_states", "return_dict"}
_REFUSED = {
    "use_cache": "a KV cache would hold this rank's tokens only; pass use_cache=False, as shard_batch does",
    "output_attentions": "no rank computes the matrix of attention weights; leave it out, or use eager attention",
    "output_router_logits": "the router's auxiliary loss would be that of this rank's tokens only; leave it out",
}


# What the ranks compare once a batch.
_KIND = "Transformers batch"


class Attention:
    """What the library calls as a layer's attention. Holds the group, and what it has checked last."""

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp
        self._checked: tuple[Shard | None, Tensor | None] = (None, None)

    def mask(self, **asked: Any) -> Mask:
        """`describe_mask`; a rank that refuses tells those that wait in `_check`."""
        try:
            return describe_mask(**asked)
        except ValueError as error:
            problem = str(error)
        self.cp.refuse(problem, _KIND)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        distflash: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """``query [B, H, T, D]``, ``key, value [B, G, T, D]`` to ``[B, T, H, D]``; there are no attention weights."""
        others.setdefault("output_attentions", _asks_for_weights(module))
        problem = _layer_problem(query, key, attention_mask, dropout, others)
        if not self._has_checked(distflash, position_ids):
            self._check(distflash, position_ids, problem)
        elif problem is not None:
            self.cp.refuse(problem, in_attention=True)
        distflash.trace.attended = True
        q, k, v = (_in_compute_dtype(x).transpose(1, 2) for x in (query, key, value))
        documents: Documents | None = distflash.documents
        mask = attention_mask if documents is None else attention_mask & documents
        out = attention(
            q, k, v, mask=mask, cp=self.cp, seq_len=distflash.seq_len, scale=scaling, softcap=softcap, sinks=s_aux
        )
        return out, None

    def _has_checked(self, shard: Any, position_ids: Tensor | None) -> bool:
        if torch.compiler.is_compiling():  # where values cannot be read
            return isinstance(shard, Shard)
        return shard is not None and self._checked[0] == shard and self._checked[1] is position_ids

    def _check(self, shard: Any, position_ids: Tensor | None, problem: str | None) -> None:
        """Once a batch, in the first layer. All ranks call, and all raise if one has a problem or another batch."""
        problem = self._batch_problem(shard, position_ids) or problem
        if problem is not None:
            self.cp.refuse(problem, _KIND)
        try:
            self.cp.agree(_KIND, seq_len=shard.seq_len, documents=shard.documents, **dict(shard.contents))
        except ValueError as difference:
            raise ValueError(
                f"{difference}. Every rank of a context-parallel group has to be given the same whole batch: samplers "
                "go by the data-parallel rank, and shard_batch is called once, on what they return"
            ) from None
        self._checked = (shard, position_ids)

    def _batch_problem(self, shard: Any, position_ids: Tensor | None) -> str | None:
        if not isinstance(shard, Shard):
            return (
                f"batch: was not sharded for this group of ranks; {PASS_ALL}. If you did: this model's layers do not "
                "pass keywords on to their attention, and are not supported"
            )
        cp = self.cp
        if (shard.layout, shard.world_size, shard.rank) != (cp.layout, cp.world_size, cp.rank):
            return (
                f"batch: was sharded for rank {shard.rank} of {shard.world_size}, {shard.layout!r}, but {cp!r} is "
                "registered; pass shard_batch the same cp as register"
            )
        if position_ids is None:
            return None
        expected = shard.position_ids(position_ids.device)
        if (
            position_ids.dim() > 2
            or position_ids.shape[-1] != len(expected)
            or not bool((position_ids == expected).all())
        ):
            return f"position_ids: are not those of this rank's tokens in the whole sequence; {PASS_ALL}"
        return None


def _layer_problem(query: Tensor, key: Tensor, mask: Any, dropout: float, others: Mapping[str, Any]) -> str | None:
    """What a layer asks for that is not done here; None if nothing."""
    if not isinstance(mask, Mask):
        return (
            f"attention_mask: expected the mask that the model asked the library for, got {type(mask).__name__}; "
            f"matrices, and layers that make no mask, are not supported: {PASS_ALL}"
        )
    for name, given in others.items():
        if given is None or given is False or name in _HARMLESS:
            continue
        reason = _REFUSED.get(name, "it is not known here and may change the attention; leave it out of the call")
        return f"{name}: not supported; {reason}"
    if dropout:
        return f"dropout: attention dropout is not supported, got {dropout}; set config.attention_dropout = 0.0"
    if key.shape[2] != query.shape[2]:
        return f"key: {key.shape[2]} keys for {query.shape[2]} queries; a KV cache is not supported"
    return None


def _asks_for_weights(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _in_compute_dtype(x: Tensor) -> Tensor:
    """Under autocast as matrix products would be: rotated queries are in float32, values are not."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
