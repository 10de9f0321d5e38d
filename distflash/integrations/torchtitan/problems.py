"""Checks of a torchtitan configuration. They return the error message or None."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.validate import Validator
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder


def config_problem(config: Any) -> str | None:
    """Check the ``Trainer.Config`` of a run with context parallelism."""
    parallelism = config.parallelism
    if parallelism.context_parallel_load_balancer not in ("headtail", None):
        return (
            f"parallelism.context_parallel_load_balancer: {parallelism.context_parallel_load_balancer!r} places tokens "
            'by a BlockMask, which distflash does not make; take "headtail" (Zigzag) or None (Contiguous)'
        )
    if not config.training.disable_cuda_graphs:
        return (
            "training.disable_cuda_graphs: a CUDA graph would repeat the first batch's documents in every step; set it "
            "to True (--training.disable_cuda_graphs)"
        )
    return backend_problem(config) or model_problem(config.model_spec.model) or validator_problem(config)


def backend_problem(config: Any) -> str | None:
    """Check that torch and torchtitan's SPMD backend support context parallelism."""
    if config.parallelism.spmd_backend == "full_dtensor" and config.parallelism.tensor_parallel_degree > 1:
        return (
            'parallelism.spmd_backend: "full_dtensor" with tensor and context ranks did not come to an end in trials; '
            'take --parallelism.spmd_backend "partial_dtensor"'
        )
    if config.parallelism.spmd_backend != "spmd_types":
        return None
    if config.debug.spmd_typechecking:
        return "debug.spmd_typechecking: attention over ranks has no types to check; check a run without context ranks"
    if not hasattr(dist, "_is_spmd_types_available"):  # what FSDP asks before it reads the types
        return (
            'parallelism.spmd_backend: "spmd_types", torchtitan\'s default, needs FSDP as of torch 2.14, this is '
            f'{torch.__version__}; take --parallelism.spmd_backend "partial_dtensor" or "full_dtensor"'
        )
    return None


def validator_problem(config: Any) -> str | None:
    """Check that the validator is torchtitan's, of which ours is a subclass."""
    if not config.validator.enable or isinstance(config.validator, Validator.Config):
        return None
    return f"validator: expected torchtitan's Validator.Config, got {type(config.validator).__qualname__}; disable it"


def model_problem(model: Any) -> str | None:
    """Check that all layers of a model use attention with a known mask."""
    if not isinstance(model, Decoder.Config):
        return f"model_spec.model: expected the configuration of a Decoder, got {type(model).__qualname__}"
    if getattr(model, "vision_encoder", None) is not None:
        return "model_spec.model: images are placed into whole sequences, which no rank of the group has; train on text"
    own_masks = type(model)._owner.get_attention_masks is not Decoder.get_attention_masks
    for n, layer in enumerate(model.layers):
        inner = getattr(getattr(layer, "attention", None), "inner_attention", None)
        if not isinstance(inner, FlexAttention.Config | VarlenAttention.Config):
            return (
                f"model_spec.model.layers[{n}]: expected attention by FlexAttention or VarlenAttention, got "
                f"{type(inner).__qualname__}; other layers would mix each rank's own tokens only"
            )
        if own_masks and not isinstance(inner, VarlenAttention.Config):
            return (
                f"model_spec.model.layers[{n}]: this model says which keys its layers see by BlockMasks, which cannot "
                'be read; build it with attn_backend="varlen", where each layer has its window_size'
            )
    return None
