"""Draws ``docs/masks.png``: four masks, by `Mask.plot`.

Run: ``python docs/draw_masks.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import distflash as df

W, S = 4, 64
MASKS = {
    "Causal() & (Window(15) | FirstTokens(3))": df.Causal() & (df.Window(15) | df.FirstTokens(3)),
    "ImageBlocks([6, 34], [16, 20])": df.ImageBlocks([6, 34], [16, 20]),
    "Tree([-1, 0, 0, 0, 3, 3], [16, 12, 10, 6, 11, 9])": df.Tree([-1, 0, 0, 0, 3, 3], [16, 12, 10, 6, 11, 9]),
    "BlockCausal([0, 4, 16, 28, 40, 52, 64])": df.BlockCausal([0, 4, 16, 28, 40, 52, 64]),
}


def main() -> None:
    """Draw and save."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 9.6), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    for ax, (title, mask) in zip(axes.flat, MASKS.items(), strict=True):
        mask.plot(S, df.Zigzag(), W, ax=ax)
        ax.set_title(title, fontsize=11, fontweight="bold", loc="left")
    figure.savefig(Path(__file__).with_name("masks.png"))


if __name__ == "__main__":
    main()
