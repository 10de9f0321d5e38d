"""The held-out loss during training: measured, stored, and plotted against steps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distflash.recipes import manifest
from distflash.recipes.data import Corpus, open_held_out
from distflash.recipes.drawing import new_figure
from distflash.recipes.fsdp import end_forward
from distflash.recipes.model import Decoder
from distflash.recipes.step import Step
from distflash.recipes.together import is_lead, together
from distflash.recipes.trainer import check_same

SEED = 0  # selects the same parts of the text in every run
# Steps done -> loss in nats per byte.
Curve = dict[int, float]


@dataclass(frozen=True)
class HeldOut:
    """Measures a model during training, and writes the results to a file.

    every: steps between measurements; the last step is always measured. batches: per measurement.
    """

    corpus: Corpus
    path: Path
    every: int
    steps: int
    batches: int

    def watch(self, model: Decoder, forward_backward: Step, done: int) -> None:
        """Measure after `done` steps if it is due. All ranks call."""
        if done % self.every == 0 or done == self.steps:
            curve = {**(read_curve(self.path) if self.path.exists() else {}), done: self.loss(model, forward_backward)}
            if is_lead():
                self.path.write_text(json.dumps({str(step): curve[step] for step in sorted(curve)}))

    @torch.no_grad()
    def loss(self, model: Decoder, forward_backward: Step) -> float:
        """The mean loss, over the same batches every time. All ranks call."""
        config = replace(forward_backward.config, seed=SEED)
        forward = replace(forward_backward, config=config, corpus=self.corpus)
        total = sum(forward.loss(model, number).item() for number in range(self.batches))
        end_forward(model)
        return total / self.batches


def open_on_all(data: Path | None, seq_len: int) -> Corpus:
    """The corpus of `--held-out`. Raises Refused on all ranks if any cannot read it or has another text."""
    corpora: list[Corpus] = []

    def look() -> str:
        corpora.append(open_held_out(data, seq_len))
        return corpora[0].fingerprint()

    check_same(together(look), "--held-out")
    return corpora[0]


def read_curve(path: Path) -> Curve:
    """Raises a ValueError that names the file if it is invalid."""
    try:
        return {int(step): float(loss) for step, loss in manifest.read_json(path).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no losses by step ({error}); move it away") from error


def plot_curves(path: Path, curves: Mapping[str, Curve], before: float, whole: int, title: str) -> None:
    """Plot held-out losses against steps. before: the original's loss. whole: the original's number of steps."""
    figure, axes = new_figure(8, 5)
    axes.axhline(before, color="black", linestyle="--", linewidth=1, label=f"original, as it was ({before:.2f})")
    for (label, curve), color in zip(curves.items(), ("#969696", "#08519c", "#e6550d", "#31a354"), strict=False):
        steps = sorted(curve)
        name = f"{label} ({curve[steps[0]]:.2f} at once, {curve[steps[-1]]:.2f} at the end)"
        axes.plot(steps, [curve[step] for step in steps], color=color, marker="o", markersize=3, label=name)
    # The initial loss of random heads is left out of the y range: it is far above all others.
    later = [loss for curve in curves.values() for loss in sorted(curve.items())[1:]]
    losses = [before, *(loss for _, loss in later)]
    axes.set_ylim(min(losses) - 0.05, max(losses) + 0.1)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("optimizer step of uptraining")
    axes.set_ylabel("held-out loss (nats per byte)")
    percent: Any = (lambda step: 100 * step / whole, lambda part: part * whole / 100)  # to the other axis, and back
    share = axes.secondary_xaxis("top", functions=percent)
    share.set_xlabel("% of the original's steps")
    axes.grid(alpha=0.3)
    axes.spines[["right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
