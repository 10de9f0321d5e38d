"""`--verify`: compare loss, output and gradients of one batch, sharded and unsharded, with `df.verify`.

Gradients are compared before clipping, which would hide a common factor.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn

import distflash as df
from distflash.recipes.model import Decoder
from distflash.recipes.reporting import Reporter
from distflash.recipes.step import Step
from distflash.recipes.together import NotVerified


def verify_step(
    sharded: Step, model: Decoder, cp: df.ContextParallel, number: int, reduction: Literal["sum", "mean"] | None
) -> df.Report:
    """Verify a step of the byte-level decoder. All ranks call.

    number: of the step, which determines its batch. reduction: as in `df.verify`.
    """

    def run(number: int, cp: df.ContextParallel | None) -> Tensor:
        step = replace(sharded, cp=None, share=(0, 1)) if cp is None else sharded
        return step(model, number)

    return verify_run(run, model, cp, number, reduction)


def verify_run(
    run: Callable[[int, df.ContextParallel | None], object],
    model: nn.Module,
    cp: df.ContextParallel,
    number: int,
    reduction: Literal["sum", "mean"] | None,
) -> df.Report:
    """Verify step `number`, run by `run(number, cp)`, over all ranks of the job."""
    return df.verify(run, number, cp, model=model, reduction=reduction, group=dist.group.WORLD, quiet=True)


def show(report: df.Report, out: Reporter) -> None:
    """Print the report on rank 0. Raises NotVerified on all ranks if it found a difference."""
    out.print(f"First batch {report}")
    if not report.ok:
        first = report.first or report.not_finite or f"the {report.worst.kind} {report.worst.name}"
        raise NotVerified(f"--verify: the sharded step is not the unsharded one, from {first} on; see the table above")


def headline(report: df.Report) -> str:
    return str(report).partition("\n")[0]
