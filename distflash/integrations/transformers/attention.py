"""Attention as the library's registry takes it: what a layer asks for, checked and handed to `distflash.attention`.

[Note: shapes] B batch, T local tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin

from distflash.api import ContextParallel, attention
from distflash.integrations.transformers.batch import KIND, PASS_ALL, Shard
from distflash.integrations.transformers.hooks import ModelHooks
from distflash.integrations.transformers.masks import LayerMask, describe_mask
from distflash.integrations.transformers.rope import rope_problem
from distflash.integrations.transformers.scales import rescaled

# Keywords that layers pass on, and what they mean here. All others would be dropped in silence, so they are refused.
_HARMLESS = {
    *("is_causal", "sliding_window", "output_hidden_states", "return_dict"),
    *("labels", "shift_labels", "num_items_in_batch"),
}
_REFUSED = {
    "use_cache": "a KV cache would hold this rank's tokens only; pass use_cache=False, as shard_batch does",
    "output_attentions": "no rank computes the matrix of attention weights; leave it out, or use eager attention",
    "output_router_logits": "the router's auxiliary loss would be that of this rank's tokens only; leave it out",
}


class Attention:
    """What the library calls as a layer's attention. Holds the group, and what it has checked last."""

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp
        self.hooks = ModelHooks(cp)
        self._checked: tuple[Shard | None, Tensor | None] = (None, None)

    def mask(self, **asked: Any) -> LayerMask:
        """`describe_mask`, whose reasons are raised by a layer that is given the mask."""
        return describe_mask(**asked)

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
        if problem is None and isinstance(distflash, Shard):
            problem = attention_mask.problem_with(distflash)
        if not self._has_checked(distflash, position_ids):
            self._check(module, distflash, position_ids, problem)
        elif problem is not None:
            self.cp.refuse(problem, in_attention=True)
        distflash.trace.note(module)
        query = rescaled(module, query, distflash)
        q, k, v = (_in_compute_dtype(x).transpose(1, 2) for x in (query, key, value))
        mask = attention_mask.within(distflash.documents)
        out = attention(
            q, k, v, mask=mask, cp=self.cp, seq_len=distflash.seq_len, scale=scaling, softcap=softcap, sinks=s_aux
        )
        return out, None

    def _has_checked(self, shard: Any, position_ids: Tensor | None) -> bool:
        if torch.compiler.is_compiling():  # where values cannot be read
            return isinstance(shard, Shard)
        return shard is not None and self._checked[0] == shard and self._checked[1] is position_ids

    def _check(self, module: nn.Module, shard: Any, position_ids: Tensor | None, problem: str | None) -> None:
        """Once a batch, in the first layer. All ranks call, and all raise if one has a problem or another batch."""
        problem = self._batch_problem(module, shard, position_ids) or problem
        if problem is not None:
            self.cp.refuse(problem, KIND)
        try:
            self.cp.agree(KIND, seq_len=shard.seq_len, documents=shard.documents, **dict(shard.contents))
        except ValueError as difference:
            raise ValueError(
                f"{difference}. Every rank of a context-parallel group has to be given the same whole batch: samplers "
                "go by the data-parallel rank, and shard_batch is called once, on what they return"
            ) from None
        self._checked = (shard, position_ids)

    def _batch_problem(self, module: nn.Module, shard: Any, position_ids: Tensor | None) -> str | None:
        if not isinstance(shard, Shard):
            return _no_shard(module)
        cp = self.cp
        if (shard.layout, shard.world_size, shard.rank) != (cp.layout, cp.world_size, cp.rank):
            return (
                f"batch: was sharded for rank {shard.rank} of {shard.world_size}, {shard.layout!r}, but {cp!r} is "
                "registered; pass shard_batch the same cp as register"
            )
        if position_ids is not None:
            expected = shard.position_ids(position_ids.device)
            fits = position_ids.dim() <= 2 and position_ids.shape[-1] == len(expected)
            if not fits or not bool((position_ids == expected).all()):
                return f"position_ids: are not those of this rank's tokens in the whole sequence; {PASS_ALL}"
        return rope_problem(getattr(module, "config", None), shard)


def _no_shard(module: nn.Module) -> str:
    """Why a layer was not given the batch's Shard."""
    generate = inspect.unwrap(GenerationMixin.generate).__code__
    if any(frame.frame.f_code is generate for frame in inspect.stack(context=0)):
        return (
            "generate: is not supported, since a rank would hold its tokens' keys only and choose the next token by "
            'itself. Generate on one process with the whole prompt: model.set_attn_implementation("sdpa") before, and '
            '"distflash" again after it'
        )
    return (
        f"batch: nothing that shard_batch adds has reached the attention of {type(module).__name__}; {PASS_ALL}. If "
        "you did: this model's layers do not pass keywords on to their attention, and are not supported"
    )


def _layer_problem(query: Tensor, key: Tensor, mask: Any, dropout: float, others: Mapping[str, Any]) -> str | None:
    """What a layer asks for that is not done here; None if nothing."""
    if not isinstance(mask, LayerMask):
        return (
            f"attention_mask: expected the mask that the model asked the library for, got {type(mask).__name__}; "
            f"matrices, and layers that make no mask, are not supported: {PASS_ALL}"
        )
    if mask.problem is not None:
        return mask.problem
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
