"""A small model that has memorised a text, for tests of inference."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distflash.recipes import trainer
from distflash.recipes.checkpoint import find_trained, model_of
from distflash.recipes.config import ModelConfig, OptimizerConfig, TrainConfig
from distflash.recipes.model import Decoder
from distflash.recipes.together import end
from distflash.recipes.weights import WRITER, load_weights

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich – naïve café?\n" * 40
SEQ_LEN = 193


def train(out: Path, data: Path) -> int:
    """Runs as a rank: checkpoints after steps 60 and 120."""
    config = TrainConfig(
        data=data,
        device="cpu",
        seq_len=SEQ_LEN,
        batch_size=4,
        steps=120,
        checkpoint_every=60,
        out=out,
        model=ModelConfig(layers=2, dim=32, heads=4, kv_heads=2),
        optimizer=OptimizerConfig(lr=2e-2, warmup=5),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer.train(config, trainer.agree(config), torch.device("cpu"))


def load_alone(run: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The newest checkpoint's model on this device."""
    choice = find_trained(run, WRITER)
    model = Decoder(model_of(choice))
    load_weights(choice.source, model)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, and what it printed."""

    code: int
    out: str
    errors: str


def as_rank(job: Callable[[Any, torch.device], int], config: Any) -> Ended:
    """Runs ``job(config, device)`` as a rank, whose terminal it takes."""
    out, errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = end(lambda: job(config, torch.device("cpu")))
    out.flush()
    return Ended(code, out.buffer.getvalue().decode(), errors.getvalue())  # type: ignore[attr-defined]
