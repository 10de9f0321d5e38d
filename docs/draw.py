"""Draws ``docs/layouts_and_ring.png``: which rank does what under a causal mask, and the ring's plans.

Run: ``python docs/draw.py``. The picture is computed from the package itself: layouts, pair counts and plans.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, Rectangle

import distflash as df
from distflash.geometry import Geometry, Needs

W, S = 4, 32
COLORS = ("#3b6fb6", "#e08a1e", "#4a9c5d", "#b5484f")
BACKGROUND = "#f4f4f2"


def draw_layout(ax: Axes, layout: df.Layout) -> None:
    """The S x S causal mask: each allowed pair in the colour of the rank that computes it, paler for later stages."""
    owner = torch.empty(S, dtype=torch.int64)
    for rank in range(W):
        owner[layout.positions(S, W, rank)] = rank
    allowed = df.Causal().materialize(torch.arange(S), torch.arange(S), S)
    image = torch.tensor(to_rgb(BACKGROUND)).expand(S, S, 3).clone()
    for i in range(S):
        color = torch.tensor(to_rgb(COLORS[owner[i]]))
        for j in range(S):
            if allowed[i, j]:
                stage = int(owner[i] - owner[j]) % W
                image[i, j] = color + (1 - color) * 0.24 * stage
    ax.imshow(image.numpy(), interpolation="nearest", extent=(0, S, S, 0))
    pairs = Needs.of(Geometry.of_sequence(df.Causal(), layout, S, W)).pairs.sum(1)
    share = (pairs * W / pairs.sum()).tolist()
    ax.set_title(f"{type(layout).__name__}", fontsize=12, fontweight="bold")
    ax.set_xlabel("key position\nwork of ranks 0 - 3:  " + "  ".join(f"{x:.2f}" for x in share), fontsize=9)
    ax.set_xticks([]), ax.set_yticks([])
    for i in range(S):
        ax.add_patch(Rectangle((-1.6, i), 1.1, 1, color=COLORS[owner[i]], clip_on=False, linewidth=0))
        ax.add_patch(Rectangle((i, S + 0.5), 1, 1.1, color=COLORS[owner[i]], clip_on=False, linewidth=0))
    ax.xaxis.labelpad = 14
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_plans(ax: Axes) -> None:
    """Each rank's plan: whose keys its queries attend to in each stage, and which keys arrive meanwhile from whom."""
    geometry = Geometry.of_sequence(df.Causal(), df.Zigzag(), S, W)
    for rank in range(W):
        for t, stage in enumerate(df.Ring().plan(geometry, rank).forward):
            for each in stage.passes:
                (source,), (rows,) = each.sources, each.visible
                text = f"attend to {len(rows.keys)} keys of {source}"
                _box(ax, (t, rank + 0.08), 0.52, COLORS[source], text, "white")
            for transfer in stage.transfers:
                if not transfer.sends:
                    label = f"{transfer.count} keys of {transfer.of} arrive from {transfer.peer}"
                    _box(ax, (t, rank + 0.62), 0.28, BACKGROUND, label, COLORS[transfer.of])
    ax.set_xlim(-0.02, W), ax.set_ylim(W, 0)
    ax.set_xticks([t + 0.5 for t in range(W)], [f"stage {t}" for t in range(W)])
    ax.set_yticks([r + 0.5 for r in range(W)], [f"rank {r}" for r in range(W)])
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=10)
    ax.set_title(
        "The ring's plan of a causal zigzag call: the next keys that a rank needs travel while it computes",
        fontsize=12,
        fontweight="bold",
    )
    for label, color in zip(ax.get_yticklabels(), COLORS, strict=True):
        label.set_color(color)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _box(ax: Axes, corner: tuple[float, float], height: float, fill: str, text: str, ink: str) -> None:
    style = "round,pad=0,rounding_size=0.04"
    ax.add_patch(FancyBboxPatch((corner[0] + 0.03, corner[1]), 0.94, height, boxstyle=style, color=fill, linewidth=0))
    ax.text(corner[0] + 0.5, corner[1] + height / 2, text, ha="center", va="center", color=ink, fontsize=9)


def main() -> None:
    """Draw and save."""
    figure = plt.figure(figsize=(12, 8.6), dpi=110, facecolor="white")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.15, 1), hspace=0.42, wspace=0.12)
    for n, layout in enumerate((df.Contiguous(), df.Zigzag(), df.Striped())):
        ax = figure.add_subplot(grid[0, n])
        draw_layout(ax, layout)
        if n == 0:
            ax.set_ylabel("query position", fontsize=9, labelpad=16)
    draw_plans(figure.add_subplot(grid[1, :]))
    figure.text(
        0.5,
        0.95,
        "Causal attention over 4 ranks: colour is the rank that computes a pair, paler is a later stage of the ring",
        ha="center",
        fontsize=11,
    )
    figure.savefig(Path(__file__).with_name("layouts_and_ring.png"), bbox_inches="tight")


if __name__ == "__main__":
    main()
