"""`deepspeed.initialize` and `PipelineModule` on a `Topology`, with checks that gradients are right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from distflash.checkpointing import keep_attention
from distflash.integrations.deepspeed.config import Config, Sizes, check_config, in_ranks, read_config
from distflash.integrations.deepspeed.topology import Topology

_REFUSED_ARGUMENTS = {
    "mpu": "DeepSpeed would sum gradients over the context ranks at ZeRO 0 to 2 and average them at 3",
    "mesh_param": "DeepSpeed would not combine the gradients of the context ranks at ZeRO 0 to 2",
    "training_data": (
        "DeepSpeed would give each rank of a ring other sequences; make a DataLoader with "
        "sampler=topology.sampler(dataset), and pass its batches through ShardBatch"
    ),
    "config_params": "is an old name; pass config",
}
# DeepSpeed's process groups live as long as the process.
_EARLIER = (
    "but DeepSpeed still has the groups of another engine that was made in this process before; make each kind of "
    "engine in a process of its own"
)


def initialize(
    topology: Topology, *, model: nn.Module, config: Mapping[str, Any] | str | Path, **arguments: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` after checks of its arguments. All ranks must call.

    Args:
        topology: the ranks' axes.
        model: a module whose attention runs over ``topology.cp``, or a `PipelineModule` made with this topology.
        config: DeepSpeed's configuration, a dict or the path of a JSON file. ``train_batch_size`` counts each sequence
            once. (The engine's ``train_batch_size()`` and samples per second count it once per rank that shares it,
            so they are ``context`` times as large.)
        arguments: other arguments of `deepspeed.initialize`: optimizer, model_parameters, lr_scheduler.

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``, as `deepspeed.initialize`.

    Raises:
        ValueError: with the configuration, an argument or the model, training would be wrong.
    """
    for name, value in arguments.items():
        if name in _REFUSED_ARGUMENTS and value is not None:
            raise ValueError(f"{name}: {_REFUSED_ARGUMENTS[name]}")
    own, sizes = read_config(config), Sizes(topology.pipe, topology.data, topology.context)
    check_config(own, sizes)
    _check_model(model, topology)
    if isinstance(model, PipelineModule):
        _check_stages(model)
        _check_checkpointing(model, own)
    elif groups.mpu is not None:
        raise ValueError(f"model: is no pipeline, {_EARLIER}")
    engine, *others = deepspeed.initialize(model=model, config=in_ranks(own, sizes), **arguments)
    _check_groups(engine, topology)
    return (engine, *others)


def pipeline_module(topology: Topology, layers: Iterable[Any], **options: Any) -> PipelineModule:
    """A `PipelineModule` of ``layers`` on the stages of a topology.

    Args:
        topology: the ranks' axes.
        layers: modules, `LayerSpec` and `TiedLayerSpec`, in order; see `Embedding`, `DecoderBlock`, `TokenWise`.
        options: of `PipelineModule`, except ``topology`` and ``num_stages``: loss_fn (see `CausalLoss`),
            partition_method, activation_checkpoint_interval. The default ``activation_checkpoint_func`` is
            `checkpoint_layers`.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    for name in ("topology", "num_stages"):
        if name in options:
            raise ValueError(f"{name}: is given by the topology, the first argument; leave it out")
    layers = list(layers)
    if len(layers) < topology.pipe:
        raise ValueError(
            f"layers: {len(layers)} are fewer than the {topology.pipe} stages of the pipeline; "
            f"give more layers, or a Topology with pipe={len(layers)} or less"
        )
    options.setdefault("activation_checkpoint_func", checkpoint_layers)
    return PipelineModule(layers, topology=topology, **options)


def checkpoint_layers(function: Any, *inputs: Tensor) -> Any:
    """An ``activation_checkpoint_func`` for `PipelineModule`.

    It keeps the inputs of the layers and the outputs of `attention`, which is not recomputed. Layers whose inputs need
    no gradient, such as an embedding, are supported.
    """
    return torch_checkpoint.checkpoint(function, *inputs, use_reentrant=False, context_fn=keep_attention)


def clip_gradients(optimizer: torch.optim.Optimizer, model: PipelineModule, max_norm: float) -> None:
    """Clip gradients by their norm over all stages of a pipeline: for float32 without ZeRO.

    In that case DeepSpeed's ``gradient_clipping`` uses the norm of the first stage only; set it to 0. With ZeRO-1 or
    bfloat16, use DeepSpeed's. Call it once on every rank, before `initialize`.

    Args:
        optimizer: the torch optimizer passed to `initialize`.
        model: the pipeline whose parameters it updates.
        max_norm: the largest norm of the gradients.
    """

    def clip(*_: Any) -> None:
        parameters = [p for p in model.parameters() if p.grad is not None]
        # A tied weight is on several stages, with the same gradient; DeepSpeed marks all copies but one.
        counted = [p.grad for p in parameters if p.grad is not None and not p.ds_pipe_replicated]
        squared = torch.nn.utils.get_total_norm(counted).square()
        dist.all_reduce(squared, group=model.mpu().get_pipe_parallel_group())
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, squared.sqrt())

    optimizer.register_step_pre_hook(clip)


def _check_model(model: Any, topology: Topology) -> None:
    pipelined = isinstance(model, PipelineModule)
    if not pipelined and topology.pipe > 1:
        raise ValueError(
            f"model: {type(model).__name__} is no PipelineModule, but the topology has {topology.pipe} stages; make "
            "one with pipeline_module(topology, layers), or a Topology with pipe=1"
        )
    if pipelined and model.topology() is not topology:
        raise ValueError(
            f"model: was made with another topology, axes {model.topology().get_axis_names()}; with an axis of its "
            "own for context, DeepSpeed does not average gradients over it. Make the model with "
            "pipeline_module(topology, layers) and this topology"
        )


def _check_stages(model: PipelineModule) -> None:
    bounds = [int(bound) for bound in model.partitions()]
    for stage, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            raise ValueError(
                f"model: stage {stage} of {len(bounds) - 1} has no layer (stages begin at {bounds[:-1]}); give a "
                "Topology with fewer stages, or more layers"
            )


def _check_checkpointing(model: PipelineModule, config: Config) -> None:
    """Raise if the first layer would use reentrant checkpointing: with token ids as inputs it gets no gradient, so the
    first stage's backward fails, and the other stages wait for it.
    """
    section = config.get("pipeline", {})
    interval = section.get("activation_checkpoint_interval", 0) or model.activation_checkpoint_interval
    reentrant = (
        model.activation_checkpoint_func is checkpointing.checkpoint and section.get("use_reentrant") is not False
    )
    if not interval or not reentrant:
        return
    first, named = _name(model._layer_specs[0]), model.checkpointable_layers
    if named is None or first in named:
        raise ValueError(
            f"activation_checkpoint_interval: {interval} would checkpoint {first}, the first layer, in the reentrant "
            "way, in which a layer that takes token ids gets no gradient; make the model with pipeline_module, whose "
            'checkpointing does not, or set "use_reentrant": false in the "pipeline" section of the configuration, or '
            "name checkpointable_layers without it"
        )


def _name(layer: Any) -> str:
    return layer.typename.__name__ if isinstance(layer, LayerSpec) else type(layer).__name__


def _check_groups(engine: Any, topology: Topology) -> None:
    expected = dist.get_process_group_ranks(topology.group)
    if (ranks := dist.get_process_group_ranks(engine.seq_data_parallel_group)) != expected:
        raise ValueError(f"topology: gradients would be averaged over ranks {ranks}, not over {expected}, {_EARLIER}")
