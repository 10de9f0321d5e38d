"""Ranks on this machine, started by torch's launcher, for commands that are not under one already."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from distflash.recipes.options import require

HELP = (
    "Processes to start on this machine, each a rank. Left out: one a GPU, or one alone on CPUs. Under torchrun and "
    "other launchers the ranks are there already."
)


def ranks_to_start(asked: int | None, device_type: str) -> int:
    """How many; 1 where this process is the only rank, or one of those that a launcher has started.

    Raises:
        ValueError: so many cannot be, or are not what the launcher has started.
    """
    if "RANK" in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        require(asked in (None, world), "--ranks", asked, f"nothing, or the {world} ranks that a launcher has started")
        return 1
    gpus = gpus_of(device_type)
    if asked is None:
        return gpus or 1
    require(asked >= 1, "--ranks", asked, "at least 1")
    require(
        device_type == "cpu" or asked <= gpus,
        "--ranks",
        asked,
        f"at most {gpus}, a GPU for each rank; or pass --device cpu",
    )
    return asked


def gpus_of(device_type: str) -> int:
    import torch

    return torch.cuda.device_count() if device_type == "cuda" else 0


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `distflash ARGUMENTS` on so many ranks, and return the exit code.

    It is that of the first rank that failed; where a signal ended a rank or this process, the one that a shell gives.
    """
    import torch.distributed.run as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    logging.disable(logging.ERROR)  # many lines on what the one below says
    command = f"distflash {arguments[0]}"
    try:
        launcher.main(["--standalone", "--nproc-per-node", str(count), "--no-python", *python(), *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        print(f"{command}: rank {failure.local_rank} {how}", file=sys.stderr)
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        print(f"{command}: ended by {stopped.sigval.name}", file=sys.stderr)
        return 128 + stopped.sigval
    return 0


def python() -> list[str]:
    """The command of a rank, which finds modules where this process does: in its folder only if this one does."""
    here = {"", os.getcwd()}
    return [sys.executable, *([] if here & set(sys.path) else ["-P"]), "-u", "-m", "distflash"]
