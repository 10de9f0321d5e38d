"""Convert a checkpoint to fewer key heads. The result is step 0 of another run.

Key and value projections are read unsharded on every rank, pooled, and sharded like the model, because pooling needs
all heads of a group. Everything else is read as by a run that resumes.
"""

from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import distflash as df
from distflash.recipes.checkpoint import MEMORY_ONLY, Checkpoints, checkpoints_of, read_shape
from distflash.recipes.config import ModelConfig, TrainConfig, require
from distflash.recipes.manifest import check
from distflash.recipes.together import Refused, together
from distflash.recipes.trainer import build, mesh_of
from distflash.recipes.uptrain_config import Method
from distflash.recipes.weights import WRITER, load_state, read_whole, save_state


def source_of(path: Path) -> Path:
    """The checkpoint of `--source`, which is a checkpoint or a run's folder (then its newest one)."""
    complete = Checkpoints(path / "checkpoints", keep=1).complete()
    source = complete[0] if complete else path
    require((source / "model.json").exists(), "--source", path, "a run's --out, or a step-* folder of its checkpoints")
    return source


def open_source(path: Path) -> tuple[Path, int, ModelConfig]:
    """The checkpoint, its number of steps and its model. All ranks call. Raises Refused if it is damaged."""
    source = together(lambda: source_of(path))[0]
    found = check(source)
    if found.writer != WRITER:
        raise Refused(f"--source: {source} was written by {found.writer}; give a checkpoint of {WRITER}")
    return source, found.step, together(lambda: shape_of(source))[0]


def shape_of(source: Path) -> ModelConfig:
    """The model of a checkpoint, without MEMORY_ONLY options."""
    stored = read_shape(source)
    names = {each.name for each in fields(ModelConfig)} - set(MEMORY_ONLY)
    try:
        return ModelConfig(**{name: stored[name] for name in names})
    except TypeError as error:
        raise ValueError(f"{source / 'model.json'} is damaged: it does not describe a model ({error})") from error


def write_grouped(config: TrainConfig, source: Path, shape: ModelConfig, method: Method, device: torch.device) -> None:
    """Write the source with the key heads of `config.model` as step 0 of the run in `--out`. All ranks call.

    shape: the source's model, with at least as many key heads.
    """
    cp = df.ContextParallel(mesh_of(config, device)["context"], layout=config.make_layout())
    model, optimizer = build(config, cp, device)
    attentions = {path: module for path, module in model.named_modules() if isinstance(module, df.nn.SelfAttention)}
    changed = {path: keys_and_values(path, module) for path, module in attentions.items()}
    if config.model.kv_heads == shape.kv_heads:
        changed = {}
    load_state(source, model, optimizer, anew={name for names in changed.values() for name in names})
    if method != "random":  # random heads are already initialised
        for names in changed.values():
            pool(source, names, shape, config.model.kv_heads, method)
    with checkpoints_of(config).writing(0, config.model, WRITER) as folder:
        save_state(folder, model, optimizer)


def keys_and_values(path: str, attention: nn.Module) -> dict[str, nn.Parameter]:
    """The weights and biases of an attention's key and value projections, by their names in the model."""
    projections = {name: attention.get_submodule(name) for name in ("k_proj", "v_proj")}
    return {
        f"{path}.{projection}.{name}": parameter
        for projection, module in projections.items()
        for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def pool(
    source: Path, parameters: dict[str, nn.Parameter], shape: ModelConfig, into: int, method: Literal["mean", "first"]
) -> None:
    """Set the parameters to the pooled heads of the source. All ranks call."""
    rows = shape.kv_heads * shape.head_dim
    whole = read_whole(source, {name: torch.Size((rows, *p.shape[1:])) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        assign(parameter, df.nn.pool_heads(whole[name], shape.heads, shape.kv_heads, into, method))


def assign(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy a full tensor into a parameter, which may be sharded."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(whole)
