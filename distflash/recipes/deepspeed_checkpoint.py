"""DeepSpeed's checkpoints, which are pickles, read so that they can make nothing but weights and state.

An unrestricted pickle runs whatever its writer liked. So all files are scanned before DeepSpeed opens any of them, and
`torch.load` is then held to what `weights_only=True` allows, which DeepSpeed itself switches off.
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

# DeepSpeed's name for what it writes to a folder of its own, which is a checkpoint's here.
TAG = "state"

# What DeepSpeed stores beside tensors, numbers and containers: plain data, whose making runs nothing else.
PLAIN = (LossScaler, ZeroStageEnum, fragment_address)


def writer_of(engine: Any, stages: int) -> str:
    """What has to be the same for a checkpoint to be read again."""
    return (
        f"launch/train_deepspeed.py with ZeRO-{int(engine.zero_optimization_stage())} on {dist.get_world_size()} ranks"
        f" in {stages} stage{'s' * (stages > 1)}"
    )


def check_engine(engine: Any) -> None:
    """A ValueError where the JSON chose a checkpoint engine whose files this module does not know."""
    kind = type(engine.checkpoint_engine)
    require(kind is TorchCheckpointEngine, "--deepspeed", f"a {kind.__name__}", "none but DeepSpeed's default")


def save_checkpoint(engine: Any, folder: Path) -> None:
    """All ranks call; a NotFinite on all of them, before anything is written, where a weight is not finite."""
    check_finite({name: local(p) for name, p in engine.module.named_parameters()})
    engine.save_checkpoint(folder, tag=TAG)


def local(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter, under ZeRO-3 a part."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def load_checkpoint(engine: Any, source: Path) -> None:
    """Read what as many ranks and stages wrote. All ranks call.

    Raises:
        Refused: on every rank, with the file that holds more than weights and state, or none that DeepSpeed reads.
    """
    together(lambda: scan(source / TAG))
    with weights_only():
        loaded, _ = engine.load_checkpoint(source, tag=TAG)
    if None in together(lambda: loaded):
        raise Refused(f"--resume: DeepSpeed finds nothing to read in {source}; start anew with another --out")


def scan(folder: Path) -> None:
    """Look at this rank's share of the files, all of which some rank looks at."""
    for file in sorted(folder.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()]:
        scan_file(file)


def scan_file(file: Path) -> None:
    """A ValueError where loading the file would make anything beside weights and state. It is not loaded."""
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
    """Within, `torch.load` makes tensors, containers and `PLAIN` only, whatever `weights_only` its callers pass."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        with safe_globals(list(PLAIN)):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)
