"""Tiny runs of torchtitan's trainer on CPUs: with dense attention of its own masks, or over ranks with distflash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.hosts import titan_on_cpus  # noqa: F401  # before what takes names from torchtitan's utilities

# isort: split
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config.configs import ParallelismConfig, TrainingConfig
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from distflash.integrations.torchtitan import context_parallel
from examples.torchtitan_llama import counting_llama
from tests.hosts.runs import TitanRun as Run
from tests.hosts.titan_parts import Loader, NoTokenizer


def configuration(run: Run, folder: str) -> Any:
    """A ``Trainer.Config`` of torchtitan alone."""
    config = llama3_debugmodel()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.tokenizer = NoTokenizer.Config()
    config.dataloader = Loader.Config(packed=run.packed)
    config.training = TrainingConfig(
        local_batch_size=run.batch // run.data,
        seq_len=64,
        steps=run.steps,
        disable_cuda_graphs=True,
        mixed_precision_param="float32",
    )
    config.parallelism = ParallelismConfig(
        context_parallel_degree=run.context, tensor_parallel_degree=run.tensor, spmd_backend=run.backend
    )
    config.validator = replace(
        config.validator, enable=True, freq=2, steps=1, dataloader=Loader.Config(packed=run.packed, seed=77)
    )
    config.optimizer.implementation = "for-loop"
    config.debug.enable_structured_logging = False
    config.dump_folder = folder
    for path, value in run.options:
        *parents, name = path.split(".")
        part = config
        for parent in parents:
            part = getattr(part, parent)
        setattr(part, name, value)
    return config


def train(run: Run, folder: str) -> dict[str, list[float]]:
    """Runs as a rank: what the trainer logs of each step, and of validation."""
    config = configuration(run, folder)
    return trained(context_parallel(config) if run.context > 1 else config, run)


def train_example(context: int, folder: str) -> dict[str, list[float]]:
    """Runs as a rank: what the trainer of examples/torchtitan_llama.py logs, with fewer layers and tokens."""
    config = counting_llama()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.training.seq_len, config.training.steps = 64, 4
    config.training.mixed_precision_param = "float32"
    config.parallelism.context_parallel_degree = context
    config.optimizer.implementation = "for-loop"
    config.debug.enable_structured_logging = False
    config.dump_folder = folder
    return trained(config, Run(context=context, backend=config.parallelism.spmd_backend))


def trained(config: Any, run: Run) -> dict[str, list[float]]:
    """What is logged of each step; on one process with dense attention."""
    if run.context == 1:
        torch.compiler.set_stance("force_eager")  # compiling torchtitan's own masks takes long on CPUs
        config.override.imports = [f"tests.hosts.titan_parts.{name}" for name in ("dense", "dense_varlen")]
    trainer = config.build()
    set_weights(trainer.model_parts[0])
    for module in trainer.model_parts[0].modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    return logged(trainer, run)


def logged(trainer: Any, run: Run) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "validation": []}
    # Under full_dtensor torchtitan's logged loss is the sum over the context ranks, with or without distflash.
    too_often = run.context if run.backend == "full_dtensor" else 1

    def log(step: int, loss: float, largest: float, norm: float, **_: Any) -> None:
        found["loss"].append(loss / too_often)
        found["grad_norm"].append(float(norm))

    trainer.metrics_processor.log = log
    trainer.metrics_processor.log_validation = lambda loss, step, **_: found["validation"].append(loss / too_often)
    trainer.train()
    trainer.close()
    return found


@torch.no_grad()
def set_weights(model: Any) -> None:
    """The same on any number of ranks, which torchtitan's own are not on CPUs."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        whole = torch.randn(p.shape, generator=generator) * 0.05 + (1.0 if "norm" in name else 0.0)
        p.copy_(distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole)
