"""Tiny Transformers models with random weights, and their results with eager attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
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
    MixtralConfig,
    PaliGemmaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
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
# Models whose routers choose among experts.
CONFIGS_OF_EXPERTS = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, router_aux_loss_coef=0.5),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router_aux_loss_coef=0.5
    ),
}
# Models that mix tokens by state spaces, gated delta nets or convolutions too; without experts.
_MAMBA = dict(
    **dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_d_conv=4),
    **dict(mamba_expand=2, mamba_chunk_size=8, bos_token_id=1, eos_token_id=2),
)
_NO_ATTENTION = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}
_TWO = ["linear_attention", "full_attention"]
CONFIGS_OF_HYBRIDS = {
    name: partial(AutoConfig.for_model, name, **sizes)
    for name, sizes in {
        "qwen3_next": dict(
            **SMALL,
            **dict(layer_types=_TWO, mlp_only_layers=[0, 1]),
            **dict(linear_num_key_heads=6, linear_num_value_heads=12, linear_key_head_dim=8, linear_value_head_dim=8),
        ),
        "qwen3_5_text": dict(
            **SMALL,
            layer_types=_TWO,
            **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
        ),
        "lfm2": dict(**SMALL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_bias=True),
        "bamba": dict(**SMALL, **_MAMBA, attn_layer_indices=[1]),
        "falcon_h1": dict(**SMALL, **_MAMBA, mamba_d_ssm=64),
        "jamba": dict(
            **SMALL,
            **dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8, mamba_dt_rank=4),
        ),
        "zamba2": dict(
            **{**SMALL, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
            **dict(mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, num_mem_blocks=1, chunk_size=8),
            **dict(use_mem_rope=True, adapter_rank=4),
        ),
        "nemotron_h": dict(
            **{**SMALL, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"]},
            **dict(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, chunk_size=8),
        ),
        "granitemoehybrid": dict(
            **SMALL,
            **_MAMBA,
            **dict(layer_types=_TWO, num_local_experts=0, shared_intermediate_size=8),
        ),
        "recurrent_gemma": dict(**SMALL, block_types=["recurrent", "attention"], lru_width=32, attention_window_size=6),
        "mamba": dict(**_NO_ATTENTION, state_size=8),
        "mamba2": dict(
            **_NO_ATTENTION, **dict(state_size=8, num_heads=6, head_dim=16, expand=3, n_groups=1, chunk_size=8)
        ),
        "falcon_mamba": dict(**_NO_ATTENTION, state_size=8),
        "rwkv": dict(**_NO_ATTENTION, attention_hidden_size=32),
        "zamba": dict(
            **{**SMALL, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
            **dict(mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2),
        ),
        "minimax": dict(
            **SMALL,
            **dict(layer_types=_TWO, num_local_experts=2, num_experts_per_tok=2, block_size=8),
            experts_implementation="eager",  # others have no float64
        ),
        "zaya": dict(
            **SMALL,
            **dict(cca_time0=3, cca_time1=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
            **dict(eos_token_id=2, experts_implementation="eager"),
        ),
    }.items()
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
        config = {**CONFIGS, **CONFIGS_OF_MASKS, **CONFIGS_OF_EXPERTS, **CONFIGS_OF_HYBRIDS}[self.family]()
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
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def enable_checkpointing(model: Any, kwargs: dict[str, Any]) -> None:
    """By the name that this version of the library has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)
