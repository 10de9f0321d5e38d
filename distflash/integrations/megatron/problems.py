"""Checks of Megatron's configuration and calls. They return the error message or None."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from distflash.context import ContextParallel
from distflash.layouts import Zigzag

_KINDS = (AttnMaskType.causal, AttnMaskType.no_mask)
_PACKED_KINDS = (*_KINDS, AttnMaskType.padding_causal, AttnMaskType.padding)


def config_problem(config: Any, attention_type: str, cp_comm_type: str | None, cp: ContextParallel) -> str | None:
    """Check a layer's configuration."""
    if config.context_parallel_size != cp.world_size:
        return (
            f"context_parallel_size: is {config.context_parallel_size}, but cp has {cp.world_size} ranks; make it of "
            "parallel_state.get_context_parallel_group()"
        )
    if cp.layout != Zigzag():
        return f"cp: expected the layout Zigzag(), in which Megatron spreads its sequences, got {cp.layout!r}"
    if attention_type != "self":
        return f'attention_type: expected "self", got {attention_type!r}; build cross-attention with Megatron\'s own'
    if cp_comm_type not in (None, "p2p"):
        return (
            f"cp_comm_type: {cp_comm_type!r} is of Transformer Engine; leave it out, and pass ContextParallel a "
            "schedule (df.AllGather(), df.Ulysses())"
        )
    if config.qk_clip or config.log_max_attention_logit:
        return "qk_clip, log_max_attention_logit: the largest score is not kept; turn both off"
    return None


def call_problem(
    query: Tensor, key: Tensor, kind: Any, attention_mask: Tensor | None, attention_bias: Tensor | None, packed: Any
) -> str | None:
    """Check a call."""
    if attention_bias is not None:
        return "attention_bias: is not supported"
    if attention_mask is not None:
        return (
            "attention_mask: expected None, since a matrix of this rank's rows cannot be read; causal masks need none "
            "(create_attention_mask=False in the data set's configuration), and packed_seq_params tells documents"
        )
    kinds = _KINDS if packed is None else _PACKED_KINDS
    if kind not in kinds:
        return f"attn_mask_type: expected one of {[each.name for each in kinds]}, got {kind}"
    if len(query) != len(key):
        return f"query, key: {len(query)} and {len(key)} tokens; inference with Megatron's cache is not supported"
    return None
