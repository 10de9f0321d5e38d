"""Megatron's core attention: what its layers build, and call with their queries, keys and values.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v; heads are those of this tensor-parallel rank.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from distflash.api import attention
from distflash.context import ContextParallel
from distflash.integrations.megatron.packed import Batches
from distflash.integrations.megatron.problems import call_problem, config_problem
from distflash.masks import Causal, Full, Mask, Window

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass(frozen=True)
class CoreAttentionBuilder:
    """What a layer's specification holds in ``core_attention``. Layers that are made by one of it share plans."""

    cp: ContextParallel
    batches: Batches

    def __call__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        pg_collection: Any = None,
    ) -> CoreAttention:
        problem = config_problem(config, attention_type, cp_comm_type, attention_dropout, self.cp)
        if problem is not None:
            raise ValueError(problem)
        layer = CoreAttention(
            _without_context(config),
            layer_number,
            attn_mask_type,
            attention_type,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )
        layer.config, layer.batches = config, self.batches
        return layer


def core_attention(cp: ContextParallel) -> CoreAttentionBuilder:
    """For the ``core_attention`` of a layer's specification.

    Args:
        cp: of Megatron's context group, in the layout `Zigzag`, in which Megatron spreads its sequences.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(
            f"cp: expected a ContextParallel, got {cp!r}; make one of parallel_state.get_context_parallel_group()"
        )
    return CoreAttentionBuilder(cp, Batches(cp))


class CoreAttention(DotProductAttention):
    """Attention over all context ranks' keys: ``core_attention`` of a Megatron layer, made by `core_attention`.

    From Megatron's own it has the scale, the parameter ``softmax_offset`` (sinks) and its checkpoint.
    """

    batches: Batches

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[T, B, H, D]``; key ``[T, B, G, D]``; value ``[T, B, G, V]``. Packed (``thd``) without B.
            attention_mask: must be None: documents are told by ``packed_seq_params``.
            attn_mask_type: causal or no_mask, of each document where they are packed; None for the layer's own.
            attention_bias: must be None.
            packed_seq_params: where packed documents end, for all ranks alike.

        Returns:
            ``[T, B, H * V]``; packed ``[T, H * V]``.

        Raises:
            ValueError: what was passed cannot be done exactly.
        """
        cp = self.batches.cp
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        problem = call_problem(query, key, kind, attention_mask, attention_bias, packed_seq_params)
        if problem is not None:
            cp.refuse(problem, in_attention=True)
        mask: Mask = Causal() if kind in _CAUSAL else Full()
        if (window := self.window()) is not None:
            mask = mask & window
        if packed_seq_params is None:
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        else:
            batch = self.batches.of(packed_seq_params, len(query) * cp.world_size)
            mask, cp = mask & batch.documents, batch.cp
            q, k, v = (x[None] for x in (query, key, value))
        sinks = None if self.softmax_offset is None else self.softmax_offset.to(q.device)
        out = attention(q, k, v, mask=mask, cp=cp, scale=self.softmax_scale * self.layer_scale(), sinks=sinks)
        return (out.transpose(0, 1) if packed_seq_params is None else out[0]).flatten(-2).contiguous()

    def window(self) -> Mask | None:
        """Where this layer's queries see a part of the sequence only."""
        config = self.config
        if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number):
            return None
        return Window(*(sys.maxsize if side == -1 else side for side in config.window_size))

    def layer_scale(self) -> int:
        """What ``apply_query_key_layer_scaling`` divides scores by for float16, and its softmax multiplies again."""
        return self.layer_number if self.config.apply_query_key_layer_scaling else 1


def _without_context(config: Any) -> Any:
    """For Megatron's own class, which takes context parallelism for Transformer Engine's alone."""
    alone = copy.copy(config)
    alone.context_parallel_size = 1
    return alone
