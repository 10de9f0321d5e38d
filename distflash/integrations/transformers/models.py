"""Checks for models in which sharding needs more than attention over ranks. They return the error message or None.

Some run before a model's forward, on its class and modules; some after it, on whether its layers have used distflash
and whether its outputs are per token.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Container, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from distflash.integrations.transformers.batch import NAME, NAMES, OTHER_NAME, Shard
from distflash.integrations.transformers.gathering import gathered
from distflash.integrations.transformers.scales import scale_problem

# Layer types with attention, or without any mixing of tokens.
_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "mlp",
    "moe",
    "dense",
    "sparse",
}
# Layer types that do not mix tokens; and types without attention that `gather_layers` supports.
_PER_TOKEN = {"mlp", "moe", "dense", "sparse"}
_WITHOUT_ATTENTION = {"linear_attention", "conv"}
_POOLING = re.compile(r"For(SequenceClassification|MultipleChoice|NextSentencePrediction)|DoubleHeads")


def model_problem(model: PreTrainedModel) -> str | None:
    """Check a model's class and modules."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        return (
            f"model: {name} is an encoder-decoder, which is not supported: keys have to be those of the queries' own "
            "tokens"
        )
    if not _takes_keywords(type(model).forward):
        return (
            f"model: {name}.forward takes no further keywords, by which a batch's Shard would reach the layers; the "
            "model is not supported"
        )
    if _own_attentions(type(model)) - {type(layer).__name__ for layer in gathered(model)}:
        return (
            f"model: the attention of {name} does not go through the library's registry of attentions, by which "
            "distflash is used; the model is not supported"
        )
    if _POOLING.search(name):
        return (
            f"model: {name} makes one result of a sequence, from the last or first of this rank's tokens, which is not "
            "supported. Use the model without that head, and take the token from cp.unshard(last_hidden_state)"
        )
    if getattr(model, "pooler", None) is not None:
        return (
            f"model: {name} has a pooler, which would take the first of this rank's tokens, not of the sequence; "
            "models that pool are not supported (BertModel and others can be built with add_pooling_layer=False)"
        )
    if getattr(config, "trigram_input", False):
        return f"model: {name} adds the neighbours of a token to it, which may be on another rank; it is not supported"
    return _position_problem(model) or _mixer_problem(model) or scale_problem(model)


def name_problem(model: PreTrainedModel) -> str | None:
    """Check the name of a model's attention implementation."""
    chunk = getattr(model.config, "attention_chunk_size", None)
    if chunk is None or not hasattr(model.config, "layer_types") or model.config._attn_implementation != NAME:
        return None
    return (
        f"attn_implementation: {type(model).__name__} attends within chunks of {chunk} tokens, which the library "
        f'refuses for longer sequences under any name with "flash" in it; give the model '
        f'attn_implementation="{OTHER_NAME}", which is the same attention as "{NAME}" by another name'
    )


def _position_problem(model: PreTrainedModel) -> str | None:
    name = type(model).__name__
    for module in _own_modules(model):
        if hasattr(module, "create_position_ids_from_input_ids"):
            return (
                f"model: {name} counts positions from padding_idx + 1 and leaves out padding, which position ids of "
                "this rank's tokens cannot tell; it is not supported"
            )
    is_innermost = not any(isinstance(module, PreTrainedModel) for module in model.modules() if module is not model)
    attends = not gathered(model) or not set(_layer_types(model)) <= _WITHOUT_ATTENTION
    if is_innermost and attends and "position_ids" not in inspect.signature(type(model).forward).parameters:
        return (
            f"model: {name}.forward takes no position_ids: it would count this rank's tokens from 0 instead of using "
            "their positions in the whole sequence; it is not supported"
        )
    return None


def _mixer_problem(model: PreTrainedModel) -> str | None:
    if (others := set(_layer_types(model)) - _LAYER_TYPES) and not gathered(model):
        return (
            f"model: has layers of type {', '.join(sorted(others))}, which are not supported: they mix tokens by other "
            "means than full, sliding or chunked attention, and would see this rank's tokens only. "
            "dft.gather_layers(model, cp) lets them see the whole sequence"
        )
    within = {inner for layer in gathered(model) for inner in layer.modules()}
    own = set(_own_modules(model)) - within
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size != (1,) and module in own:
            owner = type(model.get_submodule(path.rpartition(".")[0])).__name__
            return (
                f"model: {owner} mixes tokens by a convolution ({path}), which would see this rank's tokens only; "
                "models with such layers are not supported, but for those that dft.gather_layers(model, cp) knows"
            )
    return None


def _layer_types(model: PreTrainedModel) -> Sequence[str]:
    return getattr(model.config, "layer_types", None) or ()


def attendance_problem(model: PreTrainedModel, attended: Container[nn.Module]) -> str | None:
    """After a forward, check that all layers have used distflash.

    Args:
        attended: the modules that have called distflash's attention.
    """
    kinds = tuple({type(module) for module in model.modules() if module in attended})
    if not kinds:
        remedy = 'give the model attn_implementation="distflash" after register(cp)'
        if model.config._attn_implementation in NAMES:
            remedy = "its layers mix tokens by something else than the library's attention, and are not supported"
        return (
            "attn_implementation: the batch was sharded, but no layer of the model has used distflash, so that each "
            f"rank saw its own tokens only. {type(model).__name__} has {model.config._attn_implementation!r}: " + remedy
        )
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        types = _layer_types(model) if len(_layer_types(model)) == len(layers) else [""] * len(layers)
        mixing = [layer for layer, kind in zip(layers, types, strict=True) if kind not in _PER_TOKEN]
        uses = [any(isinstance(module, kinds) for module in layer.modules()) for layer in mixing]
        if any(uses) and not all(uses):
            other = type(mixing[uses.index(False)]).__name__
            return (
                f"model: has layers of {other} beside those that attend, which have not used distflash: they would "
                "see this rank's tokens only, and are not supported"
            )
    return None


def output_problem(model: PreTrainedModel, output: Any, shard: Shard) -> str | None:
    """After a forward, check that outputs have one result per local token."""
    if not hasattr(output, "items"):
        return None
    for name, x in output.items():
        per_token = name.endswith(("logits", "hidden_state", "pooler_output"))
        if per_token and isinstance(x, Tensor) and (x.dim() < 2 or x.shape[1] != shard.seq_local):
            return (
                f"{name}: {type(model).__name__} makes {list(x.shape)} of {shard.seq_local} tokens of this rank, not a "
                "result for each; results of some or all tokens together are not supported"
            )
    return None


def _own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, without those of nested models, which have their own check."""
    yield model
    for child in model.children():
        if not isinstance(child, PreTrainedModel):
            yield from _own_modules(child)


def _own_attentions(model: type) -> set[str]:
    """Attention classes of a model's file if it does not use the registry. Transformers also searches the source."""
    try:
        source = inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):  # no file: a notebook
        return set()
    if "ALL_ATTENTION_FUNCTIONS" in source:
        return set()
    return set(re.findall(r"^class (\w*Attention\w*)\(nn\.Module\):", source, re.MULTILINE))


def _takes_keywords(function: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
