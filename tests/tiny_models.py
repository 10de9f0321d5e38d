"""Tiny models of Transformers with random weights, and what the library's own eager attention makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma4Config,
    GptOssConfig,
    HrmTextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PaliGemmaConfig,
    Qwen3Config,
)

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


# Of models of images and text only the text model is run: tokens stand for images.
_VISION = dict(
    model_type="siglip_vision_model",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
_PALIGEMMA = dict(vision_config=_VISION, projection_dim=32, image_token_index=47)
# Models whose masks are more than causal ones and windows.
CONFIGS_OF_MASKS = {
    # Without experts; the second layer attends to everything, without RoPE, with scales that go by the position.
    "llama4": lambda: Llama4TextConfig(
        **SMALL,
        attention_chunk_size=6,
        no_rope_layer_interval=2,
        floor_scale=4,
        attn_scale=0.5,
        moe_layers=[],
        intermediate_size_mlp=24,
    ),
    "gemma3": lambda: Gemma3Config(
        text_config={**SMALL, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=47,
    ),
    "gemma4": lambda: Gemma4Config(
        text_config={
            **SMALL,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 48,
            "hidden_size_per_layer_input": 8,
            "use_bidirectional_attention": "vision",
        },
        **dict.fromkeys(("vision_config", "audio_config")),
        **{f"{kind}_token_id": 47 for kind in ("image", "video", "audio")},
    ),
    "paligemma": lambda: PaliGemmaConfig(text_config={**SMALL, "model_type": "gemma"}, **_PALIGEMMA),
    "paligemma2": lambda: PaliGemmaConfig(
        text_config={**SMALL, "model_type": "gemma2", "sliding_window": 6}, **_PALIGEMMA
    ),
    "hrm": lambda: HrmTextConfig(**{**SMALL, "num_key_value_heads": 4}, L_cycles=1, H_cycles=2),
}


def _images(n: int) -> list[int]:
    return [*range(n // 5, n // 5 + n // 4), *range(n // 2, n // 2 + n // 3)]


def _prefix(n: int) -> list[int]:
    return [*range(n // 3)]


# Which of a document's n tokens are of images, or of the prefix, and the types of these and of others.
TYPES = {
    **dict.fromkeys(("gemma3", "gemma4"), (_images, 1, 0)),
    **dict.fromkeys(("paligemma", "paligemma2"), (_prefix, 0, 1)),
    "hrm": (_prefix, 1, 0),
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

    @property
    def whole(self) -> tuple[str, ...]:
        """What the model is given of the whole sequence."""
        return (self.types,) if self.family in TYPES else ()

    @property
    def types(self) -> str:
        """What the model calls its tokens' types."""
        return "mm_token_type_ids" if self.family == "gemma4" else "token_type_ids"

    def model(self, attention: str | dict[str, str]) -> Any:
        """With attention by this name; by distflash's other one where the library wants none with "flash" in it."""
        if attention == "distflash" and self.family in ("llama4", "hrm"):
            attention = "context_parallel"
        torch.manual_seed(0)
        has_images = self.family in TYPES and self.family != "hrm"
        auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
        config = {**CONFIGS, **CONFIGS_OF_MASKS}[self.family]()
        return auto.from_config(config, attn_implementation=attention).to(self.dtype)

    def inputs(self) -> dict[str, Tensor]:
        """As a collator returns them: labels are not shifted, and none goes from one document to the next."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, SMALL["vocab_size"], (self.batch, self.seq_len), generator=generator)
        labels = ids.clone()
        labels[0, 3:9] = -100  # a prompt, in one of the sequences
        positions = torch.cat([torch.arange(n) for n in self.lengths])
        labels[:, positions == 0] = -100
        inputs = {"input_ids": ids, "labels": labels, "position_ids": positions.expand(self.batch, -1)}
        if self.family in TYPES:
            inputs[self.types] = torch.cat([self._types_of(n) for n in self.lengths]).expand(self.batch, -1)
        return inputs

    def _types_of(self, tokens: int) -> Tensor:
        chosen, one, other = TYPES[self.family]
        types = torch.full((tokens,), other)
        types[chosen(tokens)] = one
        return types


Results = dict[str, Tensor]


def results(model: Any, logits: Tensor, loss: Tensor) -> Results:
    """After backward: logits, loss, and each parameter's gradient by its name."""
    gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


@lru_cache
def eager(case: Case, computed_in: torch.dtype | None = None) -> Results:
    """Each document by itself, on one rank, with the library's eager attention and a loss by its definition.

    computed_in: another dtype to compute in, with the weights that the case's dtype has rounded.
    """
    model = case.model("eager").to(case.dtype if computed_in is None else computed_in)
    inputs = case.inputs()
    inputs = {name: x.split(case.lengths, 1) for name, x in inputs.items() if name != "position_ids"}
    logits, total = [], torch.zeros(())
    for document in zip(*inputs.values(), strict=True):
        given = dict(zip(inputs, document, strict=True))
        labels = given.pop("labels")
        logits.append(model(**given, use_cache=False).logits)
        predictions = logits[-1][:, :-1].flatten(0, 1)
        wide = torch.promote_types(predictions.dtype, torch.float32)
        total = total + F.cross_entropy(predictions.to(wide), labels[:, 1:].flatten(), reduction="sum")
    loss = total / (torch.cat(inputs["labels"], 1) != -100).sum()
    loss.backward()
    return results(model, torch.cat(logits, 1), loss)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
