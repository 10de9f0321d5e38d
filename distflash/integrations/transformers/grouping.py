"""Convert a Transformers model to fewer key heads (grouped-query attention).

The model is built on the meta device with both numbers of heads. Parameters whose shapes differ are pooled, and ints of
modules that differ are copied. Parameters with an unknown order of heads raise.

[Note: shapes] H query heads, G key heads before, G' after, D head dim.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from distflash.heads import Pooling, heads_problem, pool_heads

COUNT = "num_key_value_heads"
# Names of modules. A norm has heads if it normalises all of them at once.
SEPARATE, FUSED = ("k_proj", "v_proj", "k_norm"), "qkv_proj"


def group_key_heads(model: PreTrainedModel, kv_heads: int, *, method: Pooling = "mean") -> PreTrainedModel:
    """Reduce a model to fewer key heads, each for a group of consecutive query heads. In place.

    Weights and biases of keys and values are pooled. The config gets the new number. Unless the heads of a group were
    equal, the model needs further training. Parameters are replaced: make the optimizer afterwards.

    Args:
        model: neither sharded nor quantized nor with adapters.
        kv_heads: key heads G' of every layer, a divisor of the query heads H and less than G.
        method: "mean" over a group, in float64; "first" keeps the head of the group's first query head.

    Returns:
        The model itself.

    Raises:
        ValueError: the number is invalid, or the model has no grouped form. The model stays unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: expected a model of Transformers, got {type(model).__name__}; adapters are merged first"
        )
    text = model.config.get_text_config()
    if problem := _form_problem(text) or heads_problem(text.num_attention_heads, getattr(text, COUNT), kv_heads):
        raise ValueError(problem)
    change = Change.of(model, kv_heads, method)
    old = {name: model.get_parameter(name) for name in change.parameters}
    # One new parameter for each old one, so that sharing between layers is preserved.
    new = {parameter: change.pooled(name, parameter) for name, parameter in old.items()}
    for name, parameter in old.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, new[parameter])
    for path, counts in change.counts.items():
        for attribute, count in counts.items():
            setattr(model.get_submodule(path), attribute, count)
    for config in _configs(model, text):
        setattr(config, COUNT, kv_heads)
    return model


@dataclass(frozen=True)
class Change:
    """The changes for a smaller number of key heads.

    Attributes:
        heads, kv_heads, into: H, G and G'.
        parameters: for each parameter with key heads, its new shape.
        counts: for each module's path, its ints that differ.
    """

    heads: int
    kv_heads: int
    into: int
    method: Pooling
    parameters: dict[str, torch.Size]
    counts: dict[str, dict[str, int]]

    @classmethod
    def of(cls, model: PreTrainedModel, kv_heads: int, method: Pooling) -> Change:
        """Raises a ValueError if the model is not as Transformers builds it, or has key heads of an unknown form."""
        text = model.config.get_text_config()
        before, after = _skeleton(model, getattr(text, COUNT)), _skeleton(model, kv_heads)
        old, new = _parameters(before), _parameters(after)
        _require_like(model, old)
        parameters = {name: new[name].shape for name in old if old[name].shape != new[name].shape}
        if not parameters:
            raise ValueError(
                f"model: no parameter of {type(model).__name__} depends on {COUNT}, so that it has no grouped form"
            )
        for name in parameters:
            if _owner(name) not in (*SEPARATE, FUSED):
                raise ValueError(f"model: it is not known how the heads of {name} lie, so that they cannot be pooled")
        found = dict(after.named_modules())
        counts = {path: _differing(module, found[path]) for path, module in before.named_modules()}
        return cls(text.num_attention_heads, getattr(text, COUNT), kv_heads, method, parameters, counts)

    def pooled(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter, pooled."""
        x = parameter.detach()
        if _owner(name) == FUSED:
            queries, *others = self._split(name, x)
            pooled = torch.cat([queries, *map(self._pool, others)])
        else:
            pooled = self._pool(x)
        if pooled.shape != self.parameters[name]:
            raise ValueError(
                f"model: {name} would be {list(pooled.shape)}, and the library's is {list(self.parameters[name])}; its "
                "heads lie in an order that is not known here"
            )
        return nn.Parameter(pooled, requires_grad=parameter.requires_grad)

    def _pool(self, x: Tensor) -> Tensor:
        return pool_heads(x, self.heads, self.kv_heads, self.into, self.method)

    def _split(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of queries, keys and values, in this order."""
        head_dim = (x.shape[0] - self.parameters[name][0]) // (2 * (self.kv_heads - self.into))
        rows = [head_dim * heads for heads in (self.heads, self.kv_heads, self.kv_heads)]
        if sum(rows) != x.shape[0]:
            raise ValueError(
                f"model: {name} has {x.shape[0]} rows, and heads of {head_dim} rows would make {sum(rows)}"
            )
        return x.split(rows)


def _form_problem(config: PreTrainedConfig) -> str | None:
    """Why a config's attention has no grouped form; None if it may have one."""
    kind = config.model_type
    if getattr(config, "kv_lora_rank", None) is not None:
        return (
            f"model: {kind} makes the keys of all heads from one latent vector (kv_lora_rank={config.kv_lora_rank}), "
            "which is smaller than grouped keys are; its heads cannot be grouped"
        )
    if {COUNT, "num_attention_heads"} & set(getattr(config, "per_layer_attributes", None) or ()):
        return f"model: the layers of this {kind} have numbers of heads of their own, which is not supported"
    count = getattr(config, COUNT, None)
    if not isinstance(count, int) or not isinstance(getattr(config, "num_attention_heads", None), int):
        return (
            f"model: the config of {kind} has no {COUNT} (got {count!r}), so that the library has no grouped form of it"
        )
    return None


def _skeleton(model: PreTrainedModel, kv_heads: int) -> PreTrainedModel:
    """The model with ``kv_heads`` key heads, on the meta device."""
    config = deepcopy(model.config)
    setattr(config.get_text_config(), COUNT, kv_heads)
    with torch.device("meta"):
        return type(model)(config)


def _require_like(model: PreTrainedModel, expected: dict[str, nn.Parameter]) -> None:
    found = _parameters(model)
    if differing := sorted(found.keys() ^ expected.keys()):
        raise ValueError(
            f"model: {differing[0]} is a parameter of either this model or the library's, not of both; merge adapters, "
            "and group heads before the model is quantized"
        )
    for name, parameter in found.items():
        if isinstance(parameter, DTensor) or parameter.shape != expected[name].shape:
            raise ValueError(
                f"model: {name} is {list(parameter.shape)}{' of a DTensor' * isinstance(parameter, DTensor)}, and the "
                f"library's is {list(expected[name].shape)}; group heads before the model is sharded or quantized"
            )


def _differing(before: nn.Module, after: nn.Module) -> dict[str, int]:
    """The ints of `after` that differ in `before`."""
    return {name: x for name, x in vars(after).items() if type(x) is int and vars(before).get(name) != x}


def _owner(name: str) -> str:
    """The last part of the path of a parameter's module."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; a shared one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _configs(model: PreTrainedModel, text: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config of the text model, and the modules' copies of it."""
    held = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    return [text, *(config.get_text_config() for config in held if type(config.get_text_config()) is type(text))]
