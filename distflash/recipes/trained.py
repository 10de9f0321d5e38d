"""A model trained by `launch/train.py`, loaded on any number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import distflash as df
from distflash.recipes.checkpoint import Choice, find_trained, model_of
from distflash.recipes.inference_config import InferenceConfig
from distflash.recipes.model import Decoder
from distflash.recipes.options import printable
from distflash.recipes.together import is_lead, together
from distflash.recipes.weights import WRITER, load_weights


@dataclass(frozen=True)
class Trained:
    """The model, with attention over all ranks, and its checkpoint."""

    choice: Choice
    model: Decoder
    cp: df.ContextParallel
    device: torch.device
    dtype: torch.dtype

    def caches(self, capacity: int) -> list[df.Cache]:
        """Caches for one sequence, in the compute type."""
        return self.model.caches(capacity, self.dtype)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Use around all calls of the model: training's autocast, without gradients."""
        reduced = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=reduced):
            yield


def load_trained(config: InferenceConfig, device: torch.device) -> Trained:
    """Load the newest undamaged checkpoint. All ranks call. Raises Refused on all if there is none."""
    choice = find_trained(config.checkpoint, WRITER)
    if is_lead():
        for _, reason in choice.damaged:
            print(f"{printable(reason)}; {choice.source.name} is read in its place", file=sys.stderr, flush=True)
    shape = together(lambda: model_of(choice))[0]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    cp = df.ContextParallel(mesh, layout=config.make_layout(), schedule=df.Ring())
    model = Decoder(shape, cp).to(device).eval()
    load_weights(choice.source, model)
    return Trained(choice, model, cp, device, config.compute_dtype)
