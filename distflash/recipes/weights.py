"""Weights and optimizer state as safetensors, written and read by any number of ranks, without pickles.

`torch.distributed.checkpoint` writes them in parallel and reshards them on reading, with or without FSDP. Only tensors
are stored. Learning rate, betas and weight decay come from the command line.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from distflash.recipes.together import NotFinite, Refused, gather, together

WRITER = "launch/train.py"
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write to a folder without safetensors. All ranks call.

    Raises:
        NotFinite: on every rank, before anything is written.
        Refused: on every rank, if one of them could not write.
    """
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    state = tensors(weights, moments)
    check_finite(state)
    try:
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise failed(folder, error) from error


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, anew: Collection[str] = ()) -> None:
    """Read into the model and an optimizer that has not stepped, with any sharding. All ranks call.

    anew: parameters that are not read. They keep their values, and their moments and step counts are 0.

    Raises:
        Refused: on every rank, if one of them does not find a tensor.
    """
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)  # creates the moments with an empty step
    left_out = {f"model.{name}" for name in anew}
    for name, value in moments.items():
        if isinstance(value, Tensor) and name.removeprefix("state.").rpartition(".")[0] in anew:
            value.zero_()
            left_out.add(f"optimizer.{name}")
    read(folder, {name: x for name, x in tensors(weights, moments).items() if name not in left_out})
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=OPTIONS)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read into a model, with any sharding. All ranks call. Raises like `load_state`."""
    weights = get_model_state_dict(model)
    read(folder, tensors(weights, {}))
    set_model_state_dict(model, weights)


def read_whole(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Full parameters with these names and shapes, float32 on the CPU of every rank. All ranks call."""
    whole = {name: torch.empty(shape) for name, shape in shapes.items()}
    read(folder, {f"model.{name}": x for name, x in whole.items()})
    return whole


def read(folder: Path, state: dict[str, Tensor]) -> None:
    """Read into the tensors of `state`. All ranks call. Raises like `load_state`."""
    together(lambda: check_names(folder, state))
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise failed(folder, error) from error


def tensors(weights: dict, moments: dict) -> dict[str, Tensor]:
    """All tensors of both in one dict, not copied: reading into them changes `weights` and `moments`."""
    state = {f"model.{name}": value for name, value in weights.items()}
    state |= {f"optimizer.{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    return state


def check_names(folder: Path, state: dict[str, Tensor]) -> None:
    """Raise a ValueError if a file is no safetensors, or if a tensor is in no file."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                found.update(shard.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is no file of safetensors ({error})") from error
    if missing := sorted(state.keys() - found):
        raise ValueError(f"{folder} holds no {missing[0]}")


def check_finite(state: dict[str, Tensor]) -> None:
    """Raise NotFinite on every rank if a tensor has an infinity or NaN on any rank."""
    parts = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in state.items()}
    bad = (name for name, part in parts.items() if not bool(torch.isfinite(part).all()))
    found = gather(next(bad, None))
    reasons = {
        f"{name} is not finite; no checkpoint of it was written": rank for rank, name in enumerate(found) if name
    }
    if reasons:
        raise NotFinite(reasons)


def failed(folder: Path, error: CheckpointException) -> Refused:
    """The error that all ranks raise for the failures of any. torch has exchanged them."""
    return Refused({f"{folder}: {' '.join(str(reason).split())}": rank for rank, (reason, _) in error.failures.items()})
