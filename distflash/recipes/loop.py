"""The training loop: steps, checkpoints, and early stops on all ranks."""

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from distflash.recipes.checkpoint import Checkpoints, checkpoints_of, step_of
from distflash.recipes.config import TrainConfig
from distflash.recipes.reporting import Metrics, Reporter
from distflash.recipes.together import NotFinite, on_lead


class StopSignals:
    """Records SIGTERM and SIGINT, which any rank may get. Between steps all ranks agree to stop."""

    def __init__(self, device: torch.device) -> None:
        self.asked, self.device = False, device
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agreed(self) -> bool:
        asked = torch.tensor(int(self.asked), device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


@dataclass
class AfterStep:
    """What follows each step, in this order: its report, a checkpoint if one is due, and whether to stop.

    save: writes weights and state to a folder. writer: the program's name in checkpoints.
    """

    config: TrainConfig
    save: Callable[[Path], None]
    writer: str
    report: Reporter
    stop: StopSignals
    _proven: bool = False  # whether a step after the newest checkpoint was finite

    def __call__(self, metrics: Metrics) -> bool:
        """Returns whether a signal stops the run here. All ranks call.

        Raises:
            NotFinite: on every rank, if the loss or the gradient of the step is not finite.
        """
        config, done, checkpoints = self.config, metrics.step, checkpoints_of(self.config)
        check_finite(metrics, checkpoints)
        if not self._proven:
            on_lead(checkpoints.prune)
            self._proven = True
        self.report.step(metrics)
        stopped = self.stop.agreed()
        due = config.checkpoint_every and done % config.checkpoint_every == 0
        if stopped or due or done == config.steps:
            with checkpoints.writing(done, config.model, self.writer, config.seq_len) as folder:
                self.save(folder)
            self.report.print(f"checkpoint: {checkpoints.folder / f'step-{done:08d}'}")
            self._proven = False
        if stopped:
            self.report.print(f"stopped by a signal after step {done}; --resume continues")
        return stopped


def loop(first: int, steps: int, step: Callable[[int], Metrics], after: AfterStep) -> None:
    """Run the steps from `first` on. All ranks call. Raises like `AfterStep`."""
    for number in range(first, steps):
        if after(step(number)):
            break


def check_finite(metrics: Metrics, checkpoints: Checkpoints) -> None:
    """Raise NotFinite if the loss or the gradient is not finite. All ranks have the same numbers, so all raise."""
    if math.isfinite(metrics.loss) and (metrics.grad_norm is None or math.isfinite(metrics.grad_norm)):
        return
    raise NotFinite(
        f"step {metrics.step}: the loss is {metrics.loss} and the norm of the gradient {metrics.grad_norm}; "
        f"the run stops here. {remedy(metrics.step, checkpoints.complete())}"
    )


def remedy(step: int, complete: list[Path]) -> str:
    """What to do after a step that was not finite. complete: checkpoints, the newest first."""
    advice = "a lower --lr or --grad-clip may help"
    if not complete:
        return f"There is no checkpoint yet: start anew; {advice}"
    last = f"The last checkpoint is {complete[0]}: go on from it with --resume; {advice}"
    if step_of(complete[0]) < step - 1 or len(complete) == 1:
        return last
    return f"{last}. No step after it was finite: where it fails again, delete it to go on from {complete[1].name}"
