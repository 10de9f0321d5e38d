"""What rank 0 prints and writes: a progress bar or lines, metrics.jsonl, warnings.log, loss.png."""

import json
import resource
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distflash.recipes.config import TrainConfig
from distflash.recipes.drawing import new_figure
from distflash.recipes.warned import future_warnings_in


@dataclass(frozen=True)
class Metrics:
    """One optimizer step. step counts from 1; loss is in nats per token.

    grad_norm: before clipping; None with DeepSpeed without ZeRO.
    """

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    seconds: float
    tokens_per_second: float
    tflops_per_rank: float
    peak_memory_gib: float

    def line(self, unit: str) -> str:
        return (
            f"loss {self.loss:6.4f} | {self.tokens_per_second:,.0f} tokens/s | "
            f"{self.tflops_per_rank:.4g} TFLOP/s per {unit} | peak {self.peak_memory_gib:.2f} GiB"
        )


def peak_memory_gib(device: torch.device) -> float:
    """This rank's peak memory: allocated on its GPU, or resident on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class Reporter:
    """A context manager around the training loop. Only rank 0 prints and writes."""

    def __init__(self, config: TrainConfig, *, first_step: int, active: bool) -> None:
        self.path, self.active = config.out / "metrics.jsonl", active
        self.warnings, self.open = config.out / "warnings.log", ExitStack()
        self.first_step, self.steps, self.log_every = first_step, config.steps, config.log_every
        self.unit = "GPU" if config.device_type == "cuda" else "process"
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (active and sys.stdout.isatty()),
            expand=True,
        )
        self.task = self.progress.add_task("train", total=config.steps, completed=first_step, status="")

    def __enter__(self) -> "Reporter":
        if self.active:
            # Steps after the checkpoint are run again.
            kept = [m for m in read_metrics(self.path) if m.step <= self.first_step]
            self.path.write_text("".join(json.dumps(asdict(m)) + "\n" for m in kept))
            self.stream = self.open.enter_context(self.path.open("a", buffering=1))
        self.open.enter_context(future_warnings_in(self.warnings, self.active))
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.open.close()

    def print(self, message: object) -> None:
        self.console.print(message)

    def step(self, metrics: Metrics) -> None:
        if not self.active:
            return
        self.stream.write(json.dumps(asdict(metrics)) + "\n")
        self.progress.update(self.task, completed=metrics.step, status=metrics.line(self.unit))
        made = metrics.step - self.first_step
        if self.progress.disable and (made == 1 or metrics.step % self.log_every == 0 or metrics.step == self.steps):
            self.console.print(f"step {metrics.step}/{self.steps} | {metrics.line(self.unit)}")
            sys.stdout.flush()


def read_metrics(path: Path) -> list[Metrics]:
    """The steps in a metrics.jsonl; none if there is no file. A truncated last line is ignored."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [read_line(path, number, line) for number, line in enumerate(lines, 1)]


def read_line(path: Path, number: int, line: bytes) -> Metrics:
    try:
        metrics = Metrics(**json.loads(line))
        values = asdict(metrics) | {"grad_norm": metrics.grad_norm or 0.0}
        if not all(isinstance(value, int | float) for value in values.values()):
            raise ValueError("a value is no number")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: line {number} is no step of a run ({error}); repair or remove that line, or move the file away"
        ) from error
    return metrics


def plot_loss(out: Path, title: str) -> Path | None:
    """Plot `metrics.jsonl` as `loss.png` in the folder `out`. Returns None if there are no steps."""
    metrics = read_metrics(out / "metrics.jsonl")
    if not metrics:
        return None
    steps, losses = [m.step for m in metrics], [m.loss for m in metrics]
    figure, axes = new_figure(8, 4.5)
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="each step")
    axes.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="smoothed")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png", dpi=150)
    return out / "loss.png"


def smooth(values: list[float], most: int = 10) -> list[float]:
    """A centred moving average over up to `most` values on each side, fewer near both ends.

    It starts and ends at the values, and does not lag behind a falling loss.
    """
    sums = [0.0, *accumulate(values)]
    sides = [min(most, n, len(values) - 1 - n) for n in range(len(values))]
    return [(sums[n + side + 1] - sums[n - side]) / (2 * side + 1) for n, side in enumerate(sides)]
