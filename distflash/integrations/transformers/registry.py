"""Registration of the attention in Transformers' registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_flash_attention_utils

from distflash.context import ContextParallel
from distflash.integrations.transformers.attention import Attention
from distflash.integrations.transformers.batch import NAME, NAMES

# Model families with a list of the flash attentions that they accept. They are imported, if this version of
# Transformers has them, so that `_choosy_models` finds them.
_CHOOSY = ("Flint", "GptOss", "GraniteMoeSWA", "GraniteSWA", "MiMoV2Flash", "MiniMaxM3VL", "OpenAIPrivacyFilter")


def register(cp: ContextParallel) -> None:
    """Register attention over ``cp`` in Transformers under the name "distflash", until `unregister`.

    Models use it with ``attn_implementation="distflash"`` or ``model.set_attn_implementation("distflash")``. Models
    that refuse any attention with "flash" in its name (Llama 4, for its chunks) use it under its other name,
    "context_parallel".

    Transformers treats a name with "flash" in it as a package to load, and some models have a list of those that they
    accept. So this also records that there is nothing to load, and adds the name to the lists of the imported models
    and of those that are known to have a list.

    Until `unregister`, global hooks check Transformers models before and after their forward.

    Raises:
        ValueError: the name is registered already; call `unregister` first.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp: expected a ContextParallel, got {cp!r}; make one of the process group first")
    for name in NAMES:
        if name in AttentionInterface():
            raise ValueError(f"register: attention is registered as {name!r} already; call unregister() first")
    for family in _CHOOSY:
        getattr(transformers, f"{family}PreTrainedModel", None)
    attention = Attention(cp)
    for name in NAMES:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, attention.mask)
    for model in _choosy_models():
        model._compatible_flash_implementations = [*model._compatible_flash_implementations, NAME]
    modeling_flash_attention_utils._loaded_implementation = NAME


def unregister() -> None:
    """Undo `register`. Models that use the attention raise until they are given another one."""
    # The registry has no method for this.
    attention = AttentionInterface._global_mapping.get(NAME)
    if attention is not None:
        attention.hooks.remove()
        for name in NAMES:
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)
    for model in _choosy_models():
        model._compatible_flash_implementations = [n for n in model._compatible_flash_implementations if n != NAME]
    if modeling_flash_attention_utils._loaded_implementation == NAME:
        # A package that was loaded before is loaded again when it is asked for.
        modeling_flash_attention_utils._loaded_implementation = None


def _choosy_models(base: Any = PreTrainedModel) -> Iterator[Any]:
    """The models, of those imported so far, that list which flash attentions they take."""
    for model in base.__subclasses__():
        if vars(model).get("_compatible_flash_implementations"):
            yield model
        yield from _choosy_models(model)
