"""``core_attention`` of a Megatron layer's specification.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v; heads are those of this tensor-parallel rank.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from distflash.api import attention
from distflash.context import ContextParallel
from distflash.integrations.megatron.packed import Batches
from distflash.integrations.megatron.problems import call_problem, config_problem
from distflash.mask_algebra import Mask
from distflash.masks import Causal, Full, Window

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass(frozen=True)
class CoreAttentionBuilder:
    """Builds the `CoreAttention` of each layer. Layers of one builder share plans."""

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
        problem = config_problem(config, attention_type, cp_comm_type, self.cp)
        if problem is not None:
            raise ValueError(problem)
        layer = CoreAttention(
            _without_context(config),
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )
        layer.config, layer.batches = config, self.batches
        return layer


def core_attention(cp: ContextParallel) -> CoreAttentionBuilder:
    """A builder for ``core_attention`` of a layer's specification.

    Args:
        cp: of Megatron's context group, with the layout `Zigzag`, which Megatron's batches have.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(
            f"cp: expected a ContextParallel, got {cp!r}; make one of parallel_state.get_context_parallel_group()"
        )
    return CoreAttentionBuilder(cp, Batches(cp))


class CoreAttention(DotProductAttention):
    """Attention over all context ranks' keys, made by `core_attention`.

    It inherits the scale, the rate of dropout, the parameter ``softmax_offset`` (sinks) and its checkpointing from
    Megatron's class.
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
            attention_mask: must be None; documents come from ``packed_seq_params``.
            attn_mask_type: causal or no_mask, within each packed document; None for the layer's default.
            attention_bias: must be None.
            packed_seq_params: the boundaries of packed documents, the same on all ranks.

        Returns:
            ``[T, B, H * V]``; packed ``[T, H * V]``.

        Raises:
            ValueError: an argument is not supported.
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
        numbers: dict[str, Any] = dict(scale=self.softmax_scale * self.layer_scale(), sinks=sinks)
        if self.training and self.attention_dropout.p:
            numbers |= dict(dropout_p=self.attention_dropout.p, dropout_seed=self.dropout_seed(q.device))
        out = attention(q, k, v, mask=mask, cp=cp, **numbers)
        return (out.transpose(0, 1) if packed_seq_params is None else out[0]).flatten(-2).contiguous()

    def dropout_seed(self, device: torch.device) -> Tensor:
        """A new seed, int64 ``[]``, drawn on the device from the random state of Megatron's own attention dropout.

        That state is the same on all context ranks, and Megatron sets it back when it recomputes activations. It is
        another one on each tensor-parallel rank, whose heads are others, although each rank counts its own from 0.
        """
        # Under sequence parallelism the block has forked it.
        forked = self.config.sequence_parallel
        with nullcontext() if forked else tensor_parallel.get_cuda_rng_tracker().fork():
            return torch.randint(2**62, (), device=device)

    def window(self) -> Mask | None:
        """The layer's sliding window; None for full attention."""
        config = self.config
        if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number):
            return None
        return Window(*(sys.maxsize if side == -1 else side for side in config.window_size))

    def layer_scale(self) -> int:
        """``apply_query_key_layer_scaling`` divides scores by this factor for float16; here it is multiplied back."""
        return self.layer_number if self.config.apply_query_key_layer_scaling else 1


def _without_context(config: Any) -> Any:
    """The configuration for Megatron's class, which supports context parallelism with Transformer Engine only."""
    alone = copy.copy(config)
    alone.context_parallel_size = 1
    return alone
