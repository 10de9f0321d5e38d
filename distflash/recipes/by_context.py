"""Losses by context length, that is by the number of bytes before a prediction: numbers, a table, a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from distflash.recipes.drawing import new_figure


@dataclass(frozen=True)
class Mean:
    """Mean bits per byte of predictions with `first` to `last` bytes of context. error: standard error."""

    first: int
    last: int
    bits: float
    error: float | None


@dataclass(frozen=True)
class ByContext:
    """Losses of N sequences in B bins of context length.

    edges: int64 [B + 1], ascending: bin b has predictions with edges[b] to edges[b + 1] - 1 bytes of context.
    sums: float64 [N, B], the sum of the losses in a bin, in nats.
    """

    edges: Tensor
    sums: Tensor

    def mean(self, first: int, stop: int) -> Mean:
        """The mean over contexts of `first` to `stop - 1` bytes. Both are edges."""
        begin, end = (int(torch.searchsorted(self.edges, edge)) for edge in (first, stop))
        bits = self.sums[:, begin:end].sum(1) / (stop - first) / math.log(2)
        error = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else None
        return Mean(first, stop - 1, float(bits.mean()), error)

    def between(self, edges: list[int]) -> list[Mean]:
        return [self.mean(first, stop) for first, stop in pairwise(edges)]

    @property
    def whole(self) -> Mean:
        return self.mean(1, int(self.edges[-1]))

    def fine(self) -> list[Mean]:
        return self.between(self.edges.tolist())

    def coarse(self, trained: int | None) -> list[Mean]:
        """A few bins, each four times as wide as the one before, split at the training length."""
        return self.between(edges_of(int(self.edges[-1]) - 1, trained, per_octave=0.5).tolist())


def edges_of(seq_len: int, trained: int | None, per_octave: float = 4) -> Tensor:
    """Logarithmic bin edges for 1 to `seq_len` bytes of context, int64. trained: a length that no bin crosses."""
    steps = range(1, math.ceil(math.log2(seq_len) * per_octave))
    last = {round(2 ** (step / per_octave)) for step in steps} | {0, seq_len}
    if trained is not None and trained < seq_len:
        last.add(trained)
    return torch.tensor(sorted(last)) + 1


def table(means: list[Mean]) -> Iterator[str]:
    """A line for each bin."""
    width = len(f"{means[-1].last:,}")
    for mean in means:
        yield f"  after {mean.first:{width},} to {mean.last:{width},} bytes: {with_error(mean)}"


def with_error(mean: Mean) -> str:
    return f"{mean.bits:.3f}" if mean.error is None else f"{mean.bits:.3f} +- {mean.error:.3f}"


def plot(measured: ByContext, trained: int | None, title: str, path: Path) -> None:
    """Draw bits per byte against bytes of context, with twice the standard error as a band."""
    means = measured.fine()
    context = [(mean.first * mean.last) ** 0.5 for mean in means]
    low, high = ([mean.bits + sign * 2 * (mean.error or 0.0) for mean in means] for sign in (-1, 1))
    figure, axes = new_figure(8, 4.5)
    axes.fill_between(context, low, high, color="#9ecae1", linewidth=0, label="twice the standard error")
    axes.plot(context, [mean.bits for mean in means], color="#08519c", linewidth=2, label="mean over sequences")
    if trained is not None:
        axes.axvline(trained, color="#d94801", linestyle="--", linewidth=1.5, label=f"length in training: {trained:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("bytes of context")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
