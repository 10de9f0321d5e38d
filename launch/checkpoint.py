"""Checkpoints that are complete or absent, and that do not depend on the number of ranks or the layout.

`torch.distributed.checkpoint` shares out the writing where every rank holds the whole model, writes each rank's part
where FSDP shards it, and reads the one as the other: a run may go on with other ranks, with FSDP or without. A
checkpoint is written to a hidden folder and renamed when it is complete: whatever `step-*` there is can be loaded, and
an interrupted write leaves the previous one untouched.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from launch.config import ModelConfig

# Options of the model that say what is kept in memory, not what is computed.
MEMORY_ONLY = ("checkpoint_activations", "recompute_attention")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. Every method but `newest` is called by all ranks together."""

    folder: Path
    keep: int

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step, if there is one."""
        return max(self.folder.glob("step-*"), default=None, key=step_of)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, shape: ModelConfig) -> Path:
        """Write the state after `step` steps, then drop all but the newest `keep` checkpoints."""
        with self.writing(step, shape) as folder:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        return self.folder / f"step-{step:08d}"

    @contextmanager
    def writing(self, step: int, shape: ModelConfig) -> Iterator[Path]:
        """A folder to write a checkpoint to, which is `step-*` once all ranks have left the block."""
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".writing-{final.name}"
        lead = dist.get_rank() == 0
        if lead:
            shutil.rmtree(partial, ignore_errors=True)  # left over from an interrupted write
            partial.mkdir(parents=True)
            (partial / "model.json").write_text(json.dumps(asdict(shape)))
        dist.barrier()
        yield partial
        dist.barrier()
        if lead and not final.exists():  # a run that was stopped at a step it had just saved has nothing new
            partial.rename(final)
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
            for old in sorted(self.folder.glob("step-*"), key=step_of)[: -self.keep]:
                discarded = old.rename(self.folder / f".discarded-{old.name}")  # never a step-* that is half there
                shutil.rmtree(discarded)
        dist.barrier()

    def load(self, source: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Read `source` into the model and an optimizer that has not stepped; the number of steps it had taken."""
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=source)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return step_of(source)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def check_shape(source: Path, shape: ModelConfig) -> None:
    """A ValueError that names the first option of the model in which `source` differs from this run."""
    stored = json.loads((source / "model.json").read_text())
    for name, value in asdict(shape).items():
        if name not in MEMORY_ONLY and stored[name] != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: got {value}, but {source} was trained with {stored[name]}; "
                "resume with the same model, or start anew with another --out"
            )
