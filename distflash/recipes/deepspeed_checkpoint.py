"""DeepSpeed's checkpoints. They are pickles, and are read without executing code from them.

All files are scanned before DeepSpeed opens any, and `torch.load` is restricted to `weights_only=True`, which DeepSpeed
turns off.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from distflash.recipes.config import require
from distflash.recipes.together import Refused, together
from distflash.recipes.weights import check_finite

# DeepSpeed's tag, a subfolder of the checkpoint.
TAG = "state"

# Classes that DeepSpeed stores besides tensors, numbers and containers. They are plain data, safe to unpickle.
PLAIN = (LossScaler, ZeroStageEnum, fragment_address)


def writer_of(engine: Any, stages: int) -> str:
    """A description of everything that must match for a checkpoint to be loaded."""
    return (
        f"launch/train_deepspeed.py with ZeRO-{int(engine.zero_optimization_stage())} on {dist.get_world_size()} ranks"
        f" in {stages} stage{'s' * (stages > 1)}"
    )


def check_engine(engine: Any) -> None:
    """Raise a ValueError if the JSON chose a checkpoint engine whose files this module cannot scan."""
    kind = type(engine.checkpoint_engine)
    require(kind is TorchCheckpointEngine, "--deepspeed", f"a {kind.__name__}", "none but DeepSpeed's default")


def save_checkpoint(engine: Any, folder: Path) -> None:
    """Save. All ranks call. Raises NotFinite on all, before anything is written, if a weight is not finite."""
    check_finite({name: local(p) for name, p in engine.module.named_parameters()})
    engine.save_checkpoint(folder, tag=TAG)


def local(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter; the whole without ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def load_checkpoint(engine: Any, source: Path) -> None:
    """Load a checkpoint written by the same number of ranks and stages. All ranks call.

    Raises:
        Refused: on every rank, if a file has unsafe content, or if DeepSpeed finds nothing to load.
    """
    together(lambda: scan(source / TAG))
    with weights_only():
        loaded, _ = engine.load_checkpoint(source, tag=TAG)
    if None in together(lambda: loaded):
        raise Refused(f"--resume: DeepSpeed finds nothing to read in {source}; start anew with another --out")


def scan(folder: Path) -> None:
    """Scan this rank's share of the files. Together the ranks scan all of them."""
    for file in sorted(folder.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()]:
        scan_file(file)


def scan_file(file: Path) -> None:
    """Raise a ValueError if loading the file could run code. The file is not loaded."""
    try:
        with safe_globals(list(PLAIN)):
            strange = get_unsafe_globals_in_checkpoint(str(file))
    except Exception as error:  # whatever a reader of zip archives and pickles finds wrong with it
        raise ValueError(f"--resume: {file} is no file of torch.save ({type(error).__name__}: {error})") from error
    if strange:
        raise ValueError(
            f"--resume: {file} holds {', '.join(strange)}, which no checkpoint of this program does, and which may run "
            "code when loaded; it was not loaded. Resume from a checkpoint that you made"
        )


@contextmanager
def weights_only() -> Iterator[None]:
    """Within it, `torch.load` restores tensors, containers and `PLAIN` only, whatever its callers pass."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        with safe_globals(list(PLAIN)):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)
