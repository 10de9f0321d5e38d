"""A hand-written training loop for a Llama of Transformers: FSDP2, activation checkpointing, a chunked loss.

Shapes: B sequences, T tokens of each on this rank, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

Inputs = dict[str, Any]


class CausalLM(nn.Module):
    """The model with its loss, whose logits [B, T, V] are never there as a whole.

    chunk: tokens of which logits are computed at a time, and again in backward; 0 for all at once.
    """

    def __init__(self, model: LlamaForCausalLM, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """The sum of this rank's losses, a scalar in float32."""
        hidden = self.model.model(**inputs).last_hidden_state
        if not self.chunk:
            return self.loss_sum(hidden, labels)
        chunks = zip(hidden.split(self.chunk, 1), labels.split(self.chunk, 1), strict=True)
        losses = [checkpoint(self.loss_sum, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in chunks]
        return torch.stack(losses).sum()

    def loss_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def llama(sizes: tuple[int, int, int, int, int], vocab_size: int, seq_len: int, attention: str) -> LlamaForCausalLM:
    """With random weights. sizes: layers, width, query heads, key heads, and the width inside the MLPs."""
    layers, dim, heads, kv_heads, ffn = sizes
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim // heads,
        max_position_embeddings=seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def checkpoint_layers(model: LlamaForCausalLM, context_fn: Callable[[], Any] = noop_context_fn) -> None:
    """Keep the input of each layer, and what `context_fn` keeps, for backward.

    To be called before `shard_model`, so that weights are not gathered by the recomputation once more.
    """
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, context_fn=context_fn, preserve_rng_state=False)


def shard_model(model: CausalLM, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard weights, gradients and optimizer state over the mesh, in place. Layers are gathered one at a time."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
