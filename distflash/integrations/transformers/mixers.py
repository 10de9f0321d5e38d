"""Which layers of a family mix the sequence by something else than attention: a table by the model's type."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

# All of a family's classes that read other tokens, but for its attention. A class that is missing here is wrong in
# silence, so a family stands here only if it is compared with one process in tests.
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

# Classes that read so few tokens before each that these are fetched instead of all. How many, of a layer.
_TOKENS_BEFORE: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv"), lambda layer: layer.conv_kernel_size - 1),
    # Two convolutions, one after the other, and values of the token before.
    "ZayaCCAProjection": lambda layer: max(1, layer.conv_kernel_size),
    "RwkvFeedForward": lambda layer: 1,
}


def tokens_before(layer: Any) -> int | None:
    """How many tokens before each a layer reads; None for all of them."""
    count = _TOKENS_BEFORE.get(type(layer).__name__)
    return None if count is None else count(layer)


def mixers_of(model: Any) -> tuple[str, ...]:
    """The names of a model's classes.

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
    """Classes of the table of which a model has a layer that is neither among the chosen modules nor within one."""
    known = {name for each in _types(model) for name in MIXERS.get(each, ())}
    covered = {inner for module in chosen for inner in module.modules()}
    return {type(each).__name__ for each in model.modules() if each not in covered} & known


def _types(model: Any) -> Iterator[str]:
    """Of a model, and of its text model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield from dict.fromkeys(each.model_type for each in (config, text) if hasattr(each, "model_type"))
