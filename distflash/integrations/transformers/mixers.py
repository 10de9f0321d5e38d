"""A table of the layers that mix tokens without attention, by model type."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

# All classes of a model type that read other tokens, except attention. A missing class would silently be wrong, so
# tests compare every type with one process.
MIXERS: dict[str, tuple[str, ...]] = {
    "bailing_hybrid": ("BailingHybridDeltaAttention",),
    "bamba": ("BambaMixer",),
    "falcon_h1": ("FalconH1Mixer",),
    "falcon_mamba": ("FalconMambaMixer",),
    "granitemoehybrid": ("GraniteMoeHybridMambaLayer",),
    "jamba": ("JambaMambaMixer",),
    "kimi_linear": ("KimiLinearDeltaAttention",),
    "lfm2": ("Lfm2ShortConv",),
    "lfm2_moe": ("Lfm2MoeShortConv",),
    "lfm3": ("Lfm3ShortConv",),
    "mamba": ("MambaMixer",),
    "mamba2": ("Mamba2Mixer",),
    "minimax": ("MiniMaxLightningAttention",),
    "nemotron_h": ("NemotronHMamba2Mixer",),
    "olmo_hybrid": ("OlmoHybridGatedDeltaNet",),
    "qwen3_5_moe_text": ("Qwen3_5MoeGatedDeltaNet",),
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet",),
    "qwen3_next": ("Qwen3NextGatedDeltaNet",),
    "recurrent_gemma": ("RecurrentGemmaRecurrentBlock",),
    "rwkv": ("RwkvSelfAttention", "RwkvFeedForward"),
    "xlstm": ("xLSTMLayer",),
    "zamba": ("ZambaMambaMixer",),
    "zamba2": ("Zamba2MambaMixer",),
    "zaya": ("ZayaCCAProjection",),
}

# Classes that read only a few previous tokens, and their number.
_TOKENS_BEFORE: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv"), lambda layer: layer.conv_kernel_size - 1),
    # Two convolutions in sequence, and values of the previous token.
    "ZayaCCAProjection": lambda layer: max(1, layer.conv_kernel_size),
    "RwkvFeedForward": lambda layer: 1,
}


def tokens_before(layer: Any) -> int | None:
    """How many previous tokens a layer reads; None for all."""
    count = _TOKENS_BEFORE.get(type(layer).__name__)
    return None if count is None else count(layer)


def mixers_of(model: Any) -> tuple[str, ...]:
    """The class names for a model.

    Raises:
        ValueError: its type is not in the table.
    """
    types = list(_types(model))
    for each in types:
        if each in MIXERS:
            return MIXERS[each]
    raise ValueError(
        f"model: {type(model).__name__}, of type {' / '.join(types) or 'unknown'}, is not among the families whose "
        f"layers are known: {', '.join(MIXERS)}. Name the classes of all layers that mix tokens by something else than "
        'attention, gather_layers(model, cp, classes=["MyMixer"]), and compare the loss with that of one process'
    )


def missing_mixers(model: Any, chosen: Collection[Any]) -> set[str]:
    """Classes in the table of which a model has a layer outside of all chosen modules."""
    known = {name for each in _types(model) for name in MIXERS.get(each, ())}
    covered = {inner for module in chosen for inner in module.modules()}
    return {type(each).__name__ for each in model.modules() if each not in covered} & known


def _types(model: Any) -> Iterator[str]:
    """The types of a model and of its text model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield from dict.fromkeys(each.model_type for each in (config, text) if hasattr(each, "model_type"))
