"""`--verify` of the jobs: a wrong layer, or a wrong factor, ends the job with its location."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distflash as df
from distflash.recipes.config import ModelConfig, TrainConfig
from distflash.recipes.data import open_corpus
from distflash.recipes.model import Decoder
from distflash.recipes.reporting import Reporter
from distflash.recipes.step import Step
from distflash.recipes.together import end
from distflash.recipes.verify import show, verify_step

pytestmark = pytest.mark.timeout(300)

CONFIG = TrainConfig(device="cpu", seq_len=65, model=ModelConfig(layers=3, dim=32, heads=4, kv_heads=2, ffn=32))


class LocalPositions(nn.Module):
    """The mistake of a rank that takes its own tokens for the first ones."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> object:
        return self.rope(q, k, torch.arange(q.shape[1]))


@dataclass(frozen=True)
class Ended:
    code: int
    shown: str
    error: str


def verified(fault: str) -> Ended:
    """Runs as a rank."""
    cp = df.ContextParallel(dist.group.WORLD)
    torch.manual_seed(0)
    model = Decoder(CONFIG.model, cp)
    if fault == "layer":
        model.blocks[1].attention.rope = LocalPositions(model.blocks[1].attention.rope)
    # Gradients of a loss for an average are too large by the number of ranks where they are summed.
    loss_for = "mean" if fault == "factor" else "sum"
    step = Step(CONFIG, open_corpus(None, CONFIG.seq_len), torch.device("cpu"), cp, (0, 1), loss_for)

    def job() -> int:
        show(verify_step(step, model, cp, 0, "sum"), Reporter(CONFIG, first_step=0, active=dist.get_rank() == 0))
        return 0

    shown, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(error):
        code = end(job)
    return Ended(code, shown.getvalue(), error.getvalue())


def test_a_right_step_is_verified(ranks_of) -> None:
    first, second = ranks_of(2).run(verified, "")
    assert first.code == second.code == 0 and not first.error
    assert "verified: sharded and unsharded agree" in first.shown and "bound: 4 x" in first.shown
    assert len(first.shown.splitlines()) <= 8 and not second.shown


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("layer", "first layer that differs: blocks.1"),
        ("factor", "all gradients are 2 times what they should be"),  # which clipping and AdamW hide
    ],
)
def test_a_wrong_step_ends_the_job_on_every_rank(fault: str, words: str, ranks_of) -> None:
    first, second = ranks_of(2).run(verified, fault)
    assert (first.code, second.code) == (1, 1)
    assert "NOT VERIFIED" in first.shown and words in first.shown, first.shown
    assert "--verify: the sharded step is not the unsharded one" in first.error and not second.error
