"""Errors that end the job on every rank at once, with one line for each reason and one exit code.

What a single rank finds wrong (a file that it cannot read, say) would leave the others waiting for it. Such work goes
through `together`: every rank learns what any rank found, and all of them raise the same error.
"""

import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from distflash.recipes.options import printable

Result = TypeVar("Result")


class JobError(ValueError):
    """Ends the job on every rank. reasons: each one, with the first rank that gave it. code: of the process."""

    code = 1

    def __init__(self, reasons: Mapping[str, int] | str) -> None:
        self.reasons = {reasons: 0} if isinstance(reasons, str) else dict(reasons)
        super().__init__("; ".join(self.reasons))


class NotVerified(JobError):
    """`--verify` found a difference that rounding does not explain."""

    code = 1


class Refused(JobError):
    """What was asked for is not done: an option, a file or the data is at fault."""

    code = 2


class NotFinite(JobError):
    """The loss, the norm of the gradient or a weight is infinite or not a number."""

    code = 3


def together(work: Callable[[], Result]) -> list[Result]:
    """Do `work` on every rank; the results by rank. All ranks call.

    Raises:
        Refused: on every rank, with the reasons of all ranks on which `work` raised a ValueError or an OSError.
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
    """Do `work` on the first rank alone, while the others wait. All ranks call; raises like `together`."""
    together(lambda: work() if is_lead() else None)


def end(work: Callable[[], int]) -> int:
    """The exit code of `work`. A `JobError` is printed by the first rank, one line for each of its reasons."""
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
    """The values of all ranks; this one's alone in a process without a group."""
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
