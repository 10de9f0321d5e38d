"""Tiny models of Transformers with random weights, and what the library's own eager attention makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config

# Weights so large that attention is far from uniform.
SMALL: dict[str, Any] = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
    pad_token_id=0,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**SMALL, sliding_window=6, attn_logit_softcapping=3.0, query_pre_attn_scalar=20),
    # Every expert takes every token: a choice of experts would jump at a rounding.
    "gpt_oss": lambda: GptOssConfig(**SMALL, sliding_window=6, num_local_experts=2, num_experts_per_tok=2),
}


@dataclass(frozen=True)
class Case:
    """A model and a batch. lengths: of the packed documents; one for none."""

    family: str
    lengths: tuple[int, ...] = (37,)
    batch: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def seq_len(self) -> int:
        return sum(self.lengths)

    def model(self, attention: str) -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[self.family](), attn_implementation=attention)
        return model.to(self.dtype)

    def inputs(self) -> dict[str, Tensor]:
        """As a collator returns them: labels are not shifted, and none goes from one document to the next."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, SMALL["vocab_size"], (self.batch, self.seq_len), generator=generator)
        labels = ids.clone()
        labels[0, 3:9] = -100  # a prompt, in one of the sequences
        positions = torch.cat([torch.arange(n) for n in self.lengths])
        labels[:, positions == 0] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": positions.expand(self.batch, -1)}


Results = dict[str, Tensor]


def results(model: Any, logits: Tensor, loss: Tensor) -> Results:
    """After backward: logits, loss, and each parameter's gradient by its name."""
    gradients = {name: p.grad.detach() for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


@lru_cache
def eager(case: Case, computed_in: torch.dtype | None = None) -> Results:
    """Each document by itself, on one rank, with the library's eager attention and a loss by its definition.

    computed_in: another dtype to compute in, with the weights that the case's dtype has rounded.
    """
    model = case.model("eager").to(case.dtype if computed_in is None else computed_in)
    inputs = case.inputs()
    parts = zip(inputs["input_ids"].split(case.lengths, 1), inputs["labels"].split(case.lengths, 1), strict=True)
    logits, total = [], torch.zeros(())
    for ids, labels in parts:
        logits.append(model(input_ids=ids, use_cache=False).logits)
        predictions = logits[-1][:, :-1].flatten(0, 1)
        wide = torch.promote_types(predictions.dtype, torch.float32)
        total = total + F.cross_entropy(predictions.to(wide), labels[:, 1:].flatten(), reduction="sum")
    loss = total / (inputs["labels"] != -100).sum()
    loss.backward()
    return results(model, torch.cat(logits, 1), loss)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
