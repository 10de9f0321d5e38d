"""The attention function for Transformers' registry: checks a layer's arguments and calls `distflash.attention`.

[Note: shapes] B batch, T local tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distflash.api import attention
from distflash.context import ContextParallel
from distflash.dropout import of_layer
from distflash.integrations.transformers.batch import (
    KIND,
    OUR_CACHE,
    PASS_ALL,
    SHIFTED,
    Shard,
    group_problem,
    require_same_batch,
)
from distflash.integrations.transformers.cached_layer import CachedLayer, layer_of, too_many_tokens
from distflash.integrations.transformers.hooks import ModelHooks
from distflash.integrations.transformers.masks import LayerMask, describe_mask
from distflash.integrations.transformers.one_rank import clock_problem, generating
from distflash.integrations.transformers.prefilling import generate_problem
from distflash.integrations.transformers.rope import cached_rope_problem, rope_problem
from distflash.integrations.transformers.scales import rescaled

# Keywords that layers pass on, and what they mean here. All others would be dropped in silence, so they are refused.
_HARMLESS = {
    *("is_causal", "sliding_window", "output_hidden_states", "output_router_logits", "return_dict"),
    *("labels", "shift_labels", "num_items_in_batch", "tokenizer", SHIFTED),
}
_REFUSED = {
    "use_cache": "a KV cache would hold this rank's tokens only; pass use_cache=False, as shard_batch does, or "
    f"{OUR_CACHE} to generate",
    "output_attentions": "no rank computes the matrix of attention weights; leave it out, or use eager attention",
}


class Attention:
    """The attention function of all layers, and the state of its checks."""

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp
        self.hooks = ModelHooks(cp)
        self._checked: tuple[Shard | None, Tensor | None] = (None, None)

    def mask(self, **asked: Any) -> LayerMask:
        """The mask function, see `describe_mask`. Unsupported masks raise in the layers that get them."""
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
        layer = layer_of(key)
        if layer is not None:
            layer.awaits_attention = False
        problem = _layer_problem(query, key, attention_mask, others, layer)
        if dropout:
            problem = problem or _dropout_problem(module, dropout, distflash, layer)
        if problem is None and isinstance(distflash, Shard):
            problem = attention_mask.problem_with(distflash)
        if layer is not None and distflash is None:
            self._check_step(module, layer, position_ids, problem, query.shape[2])
        elif not self._has_checked(distflash, position_ids):
            self._check(module, distflash, position_ids, problem)
        elif problem is not None:
            self.cp.refuse(problem, in_attention=True)
        if distflash is not None:
            distflash.trace.note(module)
            query = rescaled(module, query, distflash)
        q, k, v = (_in_compute_dtype(x).transpose(1, 2) for x in (query, key, value))
        mask = attention_mask.within(None if distflash is None else distflash.documents)
        seq_len = None if distflash is None else distflash.seq_len
        if layer is not None:
            return layer.attend(q, k, v, mask, seq_len, scale=scaling, softcap=softcap, sinks=s_aux), None
        cp = self.cp if distflash is None else self.cp.with_layout(distflash.layout)
        numbers: dict[str, Any] = dict(scale=scaling, softcap=softcap, dropout_p=dropout)
        if dropout:  # the same when a checkpointed layer is computed again
            numbers["dropout_seed"] = of_layer(distflash.dropout_seed, _number_of(module))
        return attention(q, k, v, mask=mask, cp=cp, seq_len=seq_len, sinks=s_aux, **numbers), None

    @torch.compiler.disable
    def _check_step(
        self, module: nn.Module, layer: CachedLayer, position_ids: Tensor | None, problem: str | None, tokens: int
    ) -> None:
        """For tokens that every rank has: check, once per forward, that they are the next ones of the cache."""
        sequences = layer.sequences
        if problem is None and not sequences.checked:
            problem = (
                _other_group_problem(sequences.cp, self.cp)
                or _positions_problem(layer, position_ids, tokens)
                or too_many_tokens(tokens)
                or cached_rope_problem(module.config, layer.lengths, tokens)
                or clock_problem(self.cp)
                or generate_problem(sequences, layer.get_seq_length())
            )
        if problem is not None:
            self.cp.refuse(problem, in_attention=True)
        sequences.checked = True

    def _has_checked(self, shard: Any, position_ids: Tensor | None) -> bool:
        if torch.compiler.is_compiling():  # where values cannot be read
            return isinstance(shard, Shard)
        return shard is not None and self._checked[0] == shard and self._checked[1] is position_ids

    def _check(self, module: nn.Module, shard: Any, position_ids: Tensor | None, problem: str | None) -> None:
        """Check a batch, in its first layer. All ranks call; all raise if one has a problem or a different batch."""
        problem = self._batch_problem(module, shard, position_ids) or problem
        if problem is not None:
            self.cp.refuse(problem, KIND)
        require_same_batch(shard, self.cp)
        self._checked = (shard, position_ids)

    def _batch_problem(self, module: nn.Module, shard: Any, position_ids: Tensor | None) -> str | None:
        if not isinstance(shard, Shard):
            return _no_shard(module)
        if (problem := group_problem(shard, self.cp)) is not None:
            return problem
        if position_ids is not None:
            expected = shard.position_ids(position_ids.device)
            fits = position_ids.dim() <= 2 and position_ids.shape[-1] == len(expected)
            if not fits or not bool((position_ids == expected).all()):
                return f"position_ids: are not those of this rank's tokens in the whole sequence; {PASS_ALL}"
        config = getattr(module, "config", None)
        return rope_problem(config, shard) or cached_rope_problem(config, (shard.start,), shard.seq_len)


def _other_group_problem(of_cache: ContextParallel, registered: ContextParallel) -> str | None:
    if of_cache is registered:
        return None
    return f"past_key_values: the ShardedCache was made with {of_cache!r}, but {registered!r} is registered; use one cp"


def _positions_problem(layer: CachedLayer, position_ids: Tensor | None, tokens: int) -> str | None:
    """Check that new tokens are at the positions after those in the cache."""
    if position_ids is None:
        return None
    starts = torch.tensor(layer.lengths, device=position_ids.device)
    expected = starts[:, None] + torch.arange(tokens, device=position_ids.device)
    fits = position_ids.dim() == 2 and len(position_ids) in (1, len(expected)) and position_ids.shape[1] == tokens
    if fits and bool((position_ids == expected).all()):
        return None
    return (
        f"position_ids: of {tokens} new tokens are not those behind what the ShardedCache has had, {layer.lengths} "
        "tokens of its sequences. Pass model.generate the same input_ids as cache.prefill, and the same attention_mask "
        "if prompts are padded, or input_ids that begin with what the cache has had"
    )


def _no_shard(module: nn.Module) -> str:
    """The error for a layer that did not get the batch's Shard."""
    if generating() is not None:
        return (
            "generate: goes through no other cache than a ShardedCache, since a rank would hold its tokens' keys only "
            "and choose the next token by itself: cache = ShardedCache(cp); cache.prefill(model, input_ids); "
            "model.generate(input_ids, past_key_values=cache). If you passed one: the library has dropped it, as Phi-3 "
            "does where its RoPE goes over to other frequencies, at original_max_position_embeddings; or this is a "
            "second model beside yours (an assistant, which needs another attention; guidance is not supported)"
        )
    return (
        f"batch: nothing that shard_batch adds has reached the attention of {type(module).__name__}; {PASS_ALL}. With "
        "a Trainer, take dft.Trainer(..., context_parallel=cp), which does so. If you did: this model's layers do not "
        "pass keywords on to their attention, and are not supported"
    )


def _layer_problem(
    query: Tensor, key: Tensor, mask: Any, others: Mapping[str, Any], layer: CachedLayer | None
) -> str | None:
    """Check that a layer asks only for what is supported."""
    if not isinstance(mask, LayerMask):
        return (
            f"attention_mask: expected the mask that the model asked the library for, got {type(mask).__name__}; "
            f"matrices, and layers that make no mask, are not supported: {PASS_ALL}"
        )
    if (problem := mask.problem or (mask.uncached if layer is None else None)) is not None:
        return problem
    if layer is not None and mask.blocks:
        return (
            "mask: the model makes blocks (of images, or of a prefix) of its tokens' types, which are not supported "
            "with a cache"
        )
    for name, given in others.items():
        if given is None or given is False or name in _HARMLESS or (name == "use_cache" and layer is not None):
            continue
        reason = _REFUSED.get(name, "it is not known here and may change the attention; leave it out of the call")
        return f"{name}: not supported; {reason}"
    if key.shape[2] != query.shape[2]:
        return f"key: {key.shape[2]} keys for {query.shape[2]} queries; a KV cache is not supported, except {OUR_CACHE}"
    return None


def _number_of(module: nn.Module) -> Any:
    """Of a layer, by which masks of layers differ; None if it has none."""
    return getattr(module, "layer_idx", None)


def _dropout_problem(module: nn.Module, dropout: float, shard: Any, layer: CachedLayer | None) -> str | None:
    """Why a layer cannot have attention dropout; None if it can."""
    off = "or set config.attention_dropout = 0.0"
    if layer is not None:
        return f"dropout: attention dropout of {dropout} is not supported with a cache; call model.eval(), {off}"
    if _number_of(module) is None:
        return f"dropout: {type(module).__name__} has no layer_idx, by which masks of layers differ; {off}"
    if isinstance(shard, Shard) and shard.dropout_seed is not None:
        return None
    return (
        f"dropout: attention dropout of {dropout} needs a seed that all ranks of the group share; put dropout_seed "
        f"into the batch that shard_batch is given, an int such as the step, another in each step; {off}"
    )


def _asks_for_weights(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _in_compute_dtype(x: Tensor) -> Tensor:
    """Cast like a matrix product under autocast, since rotated queries and keys are in float32, values are not."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
