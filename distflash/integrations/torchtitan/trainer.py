"""torchtitan's trainer and validator with context parallelism, and their configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torchtitan.components.validate as titan_validate
import torchtitan.trainer as titan
import tyro
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.distributed import activation_checkpoint

from distflash import ops
from distflash.context import ContextParallel
from distflash.integrations.torchtitan.attention import Batch
from distflash.integrations.torchtitan.batch import NO_POSITIONS, documents_of
from distflash.integrations.torchtitan.problems import config_problem
from distflash.layouts import Contiguous, Zigzag
from distflash.schedules import Ring, Schedule

_OVERRIDES = [f"distflash.integrations.torchtitan.attention.{name}" for name in ("flex", "varlen")]


class SelectiveAC(activation_checkpoint.SelectiveAC):
    """torchtitan's policy, which also keeps the outputs of attention, so that forward messages are sent once."""

    @dataclass(kw_only=True, slots=True)
    class Config(activation_checkpoint.SelectiveAC.Config):
        """As torchtitan's."""

    def get_save_ops(self) -> set[Any]:
        return super().get_save_ops() | {ops.ATTENTION}


class Validator(titan_validate.Validator):
    """torchtitan's validator. cp: the context group, which the trainer sets."""

    cp: ContextParallel

    @dataclass(kw_only=True, slots=True)
    class Config(titan_validate.Validator.Config):
        """As torchtitan's."""

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor, model_parts: list[Any]) -> Any:
        batch = batch_of(input_dict, self.cp)
        inputs, labels, others = super().post_dataloading_process(input_dict, labels, model_parts)
        return inputs, labels, {**others, "attention_masks": batch}


class Trainer(titan.Trainer):
    """torchtitan's trainer with attention by distflash. Configured by `context_parallel`.

    Attributes:
        cp: the ranks that share a sequence; None if ``context_parallel_degree`` is 1, and distflash is not used.

    Raises:
        ValueError: on every rank, if the configuration is not supported.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.Trainer.Config):
        """As torchtitan's. schedule: see `ContextParallel`."""

        schedule: Annotated[Schedule, tyro.conf.Suppress] = field(default_factory=Ring)

    def __init__(self, config: Config) -> None:
        self.cp: ContextParallel | None = None
        if config.parallelism.context_parallel_degree > 1:
            if (problem := config_problem(config)) is not None:
                raise ValueError(problem)
            replace_components(config)
        super().__init__(config)
        if self.cp is not None and config.validator.enable:
            self.validator.cp = self.cp

    def init_distributed(self) -> Any:
        parallel_dims = super().init_distributed()
        if parallel_dims.cp_enabled:
            parallelism = self.config.parallelism
            layout = Contiguous() if parallelism.context_parallel_load_balancer is None else Zigzag()
            self.cp = ContextParallel(parallel_dims.get_mesh("cp"), layout, self.config.schedule)
        return parallel_dims

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor) -> Any:
        if self.cp is None:
            return super().post_dataloading_process(input_dict, labels)
        batch = batch_of(input_dict, self.cp)
        inputs, labels, others = super().post_dataloading_process(input_dict, labels)
        return inputs, labels, {**others, "attention_masks": batch}


def batch_of(input_dict: dict[str, Tensor], cp: ContextParallel) -> Batch:
    """The layers' metadata of an unsharded batch. Raises a ValueError if it has no positions."""
    if input_dict.get("positions") is None:
        raise ValueError(NO_POSITIONS)
    return Batch(cp, documents_of(input_dict["positions"]))


def replace_components(config: Trainer.Config) -> None:
    """Replace attention, validator and activation checkpointing in the configuration."""
    config.override.imports = [name for name in config.override.imports if name not in _OVERRIDES] + _OVERRIDES
    config.validator = derive(config.validator, Validator.Config)
    if type(config.activation_checkpoint) is activation_checkpoint.SelectiveAC.Config:
        config.activation_checkpoint = derive(config.activation_checkpoint, SelectiveAC.Config)


def context_parallel(config: Any, schedule: Schedule | None = None) -> Trainer.Config:
    """Change the configuration of a torchtitan run to use this `Trainer`.

    In a ``config_registry``:

        def llama3_8b_ring():
            return context_parallel(llama3_8b())

    ``--parallelism.context_parallel_degree`` is the number of ranks that share a sequence. The load balancer "headtail"
    is the layout `Zigzag`, None is `Contiguous`.

    Args:
        config: a ``torchtitan.trainer.Trainer.Config``.
        schedule: see `ContextParallel`; None for `Ring`.

    Raises:
        ValueError: it is the configuration of another trainer.
    """
    if type(config) is not titan.Trainer.Config:
        raise ValueError(
            f"config: expected torchtitan's Trainer.Config, got {type(config).__qualname__}; a trainer of your own can "
            "derive from distflash.integrations.torchtitan.Trainer"
        )
    return derive(config, Trainer.Config, schedule=Ring() if schedule is None else schedule)
