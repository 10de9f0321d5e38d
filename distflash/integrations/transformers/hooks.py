"""Checks before and after every forward of a model, with torch's global module hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from distflash.context import ContextParallel
from distflash.integrations.transformers.batch import KIND, NAME, NAMES, OUR_CACHE, Shard
from distflash.integrations.transformers.gathering import gathered, is_gathered
from distflash.integrations.transformers.models import (
    attendance_problem,
    model_problem,
    name_problem,
    output_problem,
)
from distflash.integrations.transformers.one_rank import follow, logits_of
from distflash.integrations.transformers.rope import rope_problem
from distflash.integrations.transformers.router_loss import (
    asks_for_router_logits,
    router_loss_problem,
    wants_router_loss,
    with_router_loss,
)
from distflash.integrations.transformers.sharded_cache import ShardedCache


class ModelHooks:
    """Checks a model's class and modules before its forward, and after it that all layers have used distflash.

    A model is fully checked once. Later forwards check only that some layer has used distflash.
    """

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp
        # Checked models, with their gathered layers at that time.
        self._known: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
        self._attended: WeakSet[nn.Module] = WeakSet()
        self._known_losses: WeakSet[nn.Module] = WeakSet()
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._before),
            torch_module.register_module_forward_hook(self._after, with_kwargs=True),
        ]
        self._own_handles: list[RemovableHandle] = []

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
            # torch does not remove this entry.
            torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)
        for handle in self._own_handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not isinstance(module, PreTrainedModel):
            return
        if (problem := name_problem(module)) is not None:  # every time, since it may change
            self.cp.refuse(problem, KIND)
        if self._is_known(module) or module.config._attn_implementation not in NAMES:
            return
        if (problem := model_problem(module)) is not None:
            self.cp.refuse(problem, KIND)
        if module not in self._known:
            # Global hooks cannot change keywords.
            self._own_handles.append(module.register_forward_pre_hook(only_new_tokens, with_kwargs=True))
        self._known[module] = gathered(module)

    def _is_known(self, model: nn.Module) -> bool:
        return model in self._known and all(map(is_gathered, self._known[model]))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The output if it is replaced, else None."""
        if not isinstance(module, PreTrainedModel):
            return None
        if torch.compiler.is_compiling():
            # Under torch.compile only the router loss is replaced, outside of the graph.
            asked = kwargs.get("output_router_logits")
            return self._compiled_router_loss(module, kwargs, output) if asks_for_router_logits(module, asked) else None
        shard, cache = kwargs.get(NAME), kwargs.get("past_key_values")
        if isinstance(cache, ShardedCache):
            cache.require_attended()
            if shard is None and (logits := logits_of(output)) is not None:
                follow(logits, self.cp)
        if not isinstance(shard, Shard):
            return None
        problem = (
            _cache_problem(cache)
            or self._attendance_problem(module, shard)
            or (None if isinstance(cache, ShardedCache) else output_problem(module, output, shard))
            # The first layer checks this too, but not if it is compiled, or had the batch before.
            or rope_problem(module.config, shard)
        )
        if problem is not None:
            self.cp.refuse(problem, KIND)
        if wants_router_loss(module, kwargs.get("output_router_logits")):
            return self._with_router_loss(module, kwargs.get("attention_mask"), output)
        return None

    @torch.compiler.disable
    def _compiled_router_loss(self, model: PreTrainedModel, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not isinstance(kwargs.get(NAME), Shard) or not wants_router_loss(model, kwargs.get("output_router_logits")):
            return None
        return self._with_router_loss(model, kwargs.get("attention_mask"), output)

    def _with_router_loss(self, model: PreTrainedModel, attention_mask: Tensor | None, output: Any) -> Any:
        if model not in self._known_losses:
            if (problem := router_loss_problem(model, output, attention_mask)) is not None:
                self.cp.refuse(problem, KIND)
            self._known_losses.add(model)
        return with_router_loss(model, output, attention_mask, self.cp)

    def _attendance_problem(self, model: PreTrainedModel, shard: Shard) -> str | None:
        layers = shard.trace.layers
        known = model in self._attended and any(module in layers for module in model.modules())
        if known or shard.trace.compiled:
            return None
        problem = attendance_problem(model, layers)
        if problem is None:
            self._attended.add(model)
        return problem


def only_new_tokens(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Drop tokens of a call that are in the `ShardedCache`: assisted generation starts with the whole prompt."""
    cache, ids, positions = (kwargs.get(name) for name in ("past_key_values", "input_ids", "position_ids"))
    if not isinstance(cache, ShardedCache) or kwargs.get(NAME) is not None:
        return None
    cache.forget_unfinished()
    if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.dim() != 2 or not cache.lengths:
        return None
    new = 1 if ids.shape[1] == 1 else int(positions[0, -1]) + 1 - cache.lengths[0]
    if not 0 < new < ids.shape[1]:
        return None
    return args, {**kwargs, "input_ids": ids[:, -new:], "position_ids": positions[:, -new:]}


def _cache_problem(cache: Any) -> str | None:
    if not isinstance(cache, Cache) or isinstance(cache, ShardedCache):
        return None
    return (
        f"past_key_values: a {type(cache).__name__} would hold this rank's tokens only; pass {OUR_CACHE}, and prefill "
        "it with cache.prefill(model, input_ids)"
    )
