"""Which layers of a family mix the sequence by something else than attention: a table by the model's type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# All of a family's classes that read other tokens, but for its attention. A class that is missing here is wrong in
# silence, so a family stands here only if it is compared with one process in tests.
MIXERS: dict[str, tuple[str, ...]] = {
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
    "nemotron_h": ("NemotronHMamba2Mixer",),
    "olmo_hybrid": ("OlmoHybridGatedDeltaNet",),
    "qwen3_5_moe_text": ("Qwen3_5MoeGatedDeltaNet",),
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet",),
    "qwen3_next": ("Qwen3NextGatedDeltaNet",),
    "recurrent_gemma": ("RecurrentGemmaRecurrentBlock",),
    "zamba2": ("Zamba2MambaMixer",),
}


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


def _types(model: Any) -> Iterator[str]:
    """Of a model, and of its text model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield from dict.fromkeys(each.model_type for each in (config, text) if hasattr(each, "model_type"))
