"""Starts ranks on this machine with torchrun's launcher, for commands that run without one."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from distflash.recipes.options import require

HELP = (
    "Ranks (processes) to start on this machine. By default one per GPU, or a single one on CPUs. Not needed under "
    "torchrun and other launchers, which start the ranks."
)


def ranks_to_start(asked: int | None, device_type: str) -> int:
    """The number of ranks to start; 1 if this process is the only rank, or was started by a launcher.

    Raises:
        ValueError: there are too few GPUs, or a launcher has started another number.
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
    """Run `distflash ARGUMENTS` on `count` ranks. Returns the exit code of the first rank that failed.

    If a signal ended a rank or this process, that is 128 + the signal, as in a shell.
    """
    import torch.distributed.run as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    logging.disable(logging.ERROR)  # the launcher's many lines; one is printed below instead
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
    """The command of a rank, with the import path of this process: with the current folder only if this one has it."""
    here = {"", os.getcwd()}
    return [sys.executable, *([] if here & set(sys.path) else ["-P"]), "-u", "-m", "distflash"]
