"""A Llama of Transformers that computes logits in chunks.

Shapes: B sequences, T tokens on this rank, V entries of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import distflash as df
from distflash.integrations import transformers as dft
from distflash.recipes.torch_attention import TorchAttention
from distflash.recipes.transformers_config import TransformersConfig


class Llama(LlamaForCausalLM):
    """Computes the loss in chunks of `loss_chunk` tokens, recomputed in backward. 0: all at once."""

    loss_chunk = 0

    def forward(  # type: ignore[override]
        self, *, shift_labels: Tensor, num_items_in_batch: Tensor, labels: object = None, **inputs: Any
    ) -> CausalLMOutput:
        """shift_labels: [B, T]. num_items_in_batch: the number of labels, by which the loss sum is divided."""
        hidden = self.model(**inputs).last_hidden_state
        if not self.loss_chunk:
            return CausalLMOutput(loss=self.loss_sum(hidden, shift_labels) / num_items_in_batch)
        chunks = zip(hidden.split(self.loss_chunk, 1), shift_labels.split(self.loss_chunk, 1), strict=True)
        sums = [checkpoint(self.loss_sum, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in chunks]
        return CausalLMOutput(loss=torch.stack(sums).sum() / num_items_in_batch)

    def loss_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.lm_head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def build(config: TransformersConfig, attention: TorchAttention | None, device: torch.device) -> Llama:
    """The model, with the same initial weights on every rank. attention: None for distflash."""
    model = config.model
    torch.manual_seed(config.seed)
    with device:
        llama = Llama._from_config(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=model.dim,
                intermediate_size=model.ffn_dim,
                num_hidden_layers=model.layers,
                num_attention_heads=model.heads,
                num_key_value_heads=model.kv_heads,
                head_dim=model.head_dim,
                max_position_embeddings=config.seq_len,
                rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
                tie_word_embeddings=True,
                use_cache=False,
            ),
            attn_implementation=attention.name if attention else dft.NAME,
        )
    llama.loss_chunk = config.loss_chunk
    if model.checkpoint_activations:
        keep = attention.keep if attention else df.keep_attention
        enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": noop_context_fn if model.recompute_attention else keep})
    return llama.train()


@contextmanager
def unsharded(llama: Llama) -> Iterator[None]:
    """Within it the model uses SDPA on whole sequences."""
    before = llama.config._attn_implementation
    llama.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        llama.set_attn_implementation(before)
