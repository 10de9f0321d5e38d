"""What is checked before and after every forward of a model, through torch's own hooks on all modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from distflash.api import ContextParallel
from distflash.integrations.transformers.batch import KIND, NAME, NAMES, Shard
from distflash.integrations.transformers.models import (
    attendance_problem,
    model_problem,
    name_problem,
    output_problem,
)
from distflash.integrations.transformers.rope import rope_problem


class ModelHooks:
    """Before a model's forward: its class and modules. After it: that its layers have attended over the ranks.

    A model is looked through once; later forwards ask only whether any of its layers has attended.
    """

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp
        self._known: WeakSet[nn.Module] = WeakSet()
        self._attended: WeakSet[nn.Module] = WeakSet()
        self._handles = (
            torch_module.register_module_forward_pre_hook(self._before),
            torch_module.register_module_forward_hook(self._after, with_kwargs=True),
        )

    def remove(self) -> None:
        """Take the hooks back."""
        for handle in self._handles:
            handle.remove()
            # torch forgets this one, and would take it for a hook that is still there.
            torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not isinstance(module, PreTrainedModel):
            return
        if (problem := name_problem(module)) is not None:  # which may change
            self.cp.refuse(problem, KIND)
        if module in self._known or module.config._attn_implementation not in NAMES:
            return
        if (problem := model_problem(module)) is not None:
            self.cp.refuse(problem, KIND)
        self._known.add(module)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(module, PreTrainedModel):
            return
        shard = kwargs.get(NAME)
        if not isinstance(shard, Shard):
            return
        problem = (
            self._attendance_problem(module, shard)
            or output_problem(module, output, shard)
            # The first layer has asked this, too, but not where layers are compiled, or had the batch before.
            or rope_problem(module.config, shard)
        )
        if problem is not None:
            self.cp.refuse(problem, KIND)

    def _attendance_problem(self, model: PreTrainedModel, shard: Shard) -> str | None:
        layers = shard.trace.layers
        known = model in self._attended and any(module in layers for module in model.modules())
        if known or shard.trace.compiled:
            return None
        problem = attendance_problem(model, layers)
        if problem is None:
            self._attended.add(model)
        return problem
