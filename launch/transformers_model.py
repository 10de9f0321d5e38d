"""A Llama of Transformers, sharded by FSDP2, whose attention is that of distflash or torch's own context parallelism.

Shapes: B sequences, S tokens of a sequence, T of them on this rank, V entries of the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import distflash as df
from distflash.integrations import transformers as df_transformers
from launch.config import ModelConfig

Inputs = dict[str, Any]


class Attention(Protocol):
    """What the model attends with, by its name, and how a batch is made this rank's."""

    name: str

    def shard(self, tokens: Tensor, labels: Tensor) -> AbstractContextManager[tuple[Inputs, Tensor]]:
        """What the model takes, and this rank's labels [B, T], of whole [B, S]. Backward ends within, too."""
        ...

    def keep(self) -> Any:
        """The `context_fn` of a checkpoint that does not run attention twice."""
        ...


class DistflashAttention:
    name = "distflash"

    def __init__(self, cp: df.ContextParallel) -> None:
        self.cp = cp
        df_transformers.register(cp)

    @contextmanager
    def shard(self, tokens: Tensor, labels: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        part = df_transformers.shard_batch({"input_ids": tokens, "shift_labels": labels}, self.cp)
        # The loss is computed in chunks here, not by the model.
        mine = part.pop("shift_labels")
        yield {name: x for name, x in part.items() if name not in ("labels", "num_items_in_batch")}, mine

    def keep(self) -> Any:
        return df.keep_attention()


class Unsharded:
    """torch's attention over whole sequences, for as long as a batch lasts; then the model has its own again."""

    name = "sdpa"

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    @contextmanager
    def shard(self, tokens: Tensor, labels: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.name)
        try:
            yield {"input_ids": tokens, "use_cache": False}, labels
        finally:
            self.model.set_attn_implementation(before)

    def keep(self) -> Any:
        return noop_context_fn()


class TorchAttention:
    """`torch.distributed.tensor.experimental.context_parallel` with cuDNN, for comparison.

    repeat_kv: give each query head its own keys and values, where torch does not take fewer.
    """

    name = "torch_context_parallel"

    def __init__(self, mesh: DeviceMesh, repeat_kv: bool) -> None:
        self.mesh = mesh
        # A name that the library knows no mask for: the model then makes none, and the attention is told causal.
        AttentionInterface.register(self.name, partial(causal_sdpa, repeat_kv=repeat_kv))

    @contextmanager
    def shard(self, tokens: Tensor, labels: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel

        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        buffers = [tokens, labels, positions]
        with (
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            context_parallel(self.mesh, buffers=buffers, buffer_seq_dims=[1] * 3, no_restore_buffers=set(buffers)),
        ):
            yield {"input_ids": tokens, "position_ids": positions, "use_cache": False}, labels

    def keep(self) -> Any:
        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            kept = op is torch.ops.aten._scaled_dot_product_cudnn_attention.default
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)


def causal_sdpa(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, *, repeat_kv: bool, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of q [B, heads, T, D] over k and v [B, kv_heads, T, D], as [B, T, heads, D]."""
    if repeat_kv:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # By name from the module: context_parallel replaces it there.
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2), None


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


@dataclass(frozen=True)
class Shape:
    """Of the model, beyond what `ModelConfig` says."""

    model: ModelConfig
    vocab_size: int
    seq_len: int

    def build(self, attention: str) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.model.dim,
            intermediate_size=self.model.ffn_dim,
            num_hidden_layers=self.model.layers,
            num_attention_heads=self.model.heads,
            num_key_value_heads=self.model.kv_heads,
            head_dim=self.model.head_dim,
            max_position_embeddings=self.seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": self.model.rope_theta},
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
