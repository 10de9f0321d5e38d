"""Errors that end the job on all ranks, with one line per reason and one exit code.

If a single rank failed, for example to read a file, the others would wait for it. Work that may fail goes through
`together`: ranks exchange their errors, and all raise the same one.
"""

import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from distflash.recipes.options import printable

Result = TypeVar("Result")


class JobError(ValueError):
    """Ends the job on every rank. reasons: each with the first rank that has it. code: the exit code."""

    code = 1

    def __init__(self, reasons: Mapping[str, int] | str) -> None:
        self.reasons = {reasons: 0} if isinstance(reasons, str) else dict(reasons)
        super().__init__("; ".join(self.reasons))


class NotVerified(JobError):
    """`--verify` found a difference larger than rounding."""

    code = 1


class Refused(JobError):
    """An option, a file or the data is invalid."""

    code = 2


class NotFinite(JobError):
    """The loss, the gradient norm or a weight is infinite or NaN."""

    code = 3


def together(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every rank, and return all results by rank. All ranks call.

    Raises:
        Refused: on every rank, if `work` raised a ValueError or an OSError on any, with the reasons of all.
    """
    outcome: tuple[Result | None, str] = None, ""
    try:
        outcome = work(), ""
    except (ValueError, OSError) as error:
        outcome = None, explain(error)
    outcomes = gather(outcome)
    reasons = {reason: rank for rank, (_, reason) in reversed(list(enumerate(outcomes))) if reason}
    if reasons:
        raise Refused(reasons)
    return [result for result, _ in outcomes]  # type: ignore[misc]


def on_lead(work: Callable[[], object]) -> None:
    """Run `work` on rank 0, while the others wait. All ranks call. Raises like `together`."""
    together(lambda: work() if is_lead() else None)


def end(work: Callable[[], int]) -> int:
    """The exit code of `work`. Rank 0 prints a `JobError`, one line per reason."""
    try:
        return work()
    except JobError as error:
        if is_lead():
            for reason, rank in error.reasons.items():
                print(f"error (rank {rank}): {printable(reason)}", file=sys.stderr, flush=True)
        return error.code


def is_lead() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(value: Result) -> list[Result]:
    """The values of all ranks; only this one's without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Result] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def explain(error: ValueError | OSError) -> str:
    """The error in one line that names the file, if there is one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
