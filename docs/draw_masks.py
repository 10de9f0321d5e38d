"""Draws the pictures of `docs/masks.md` by `Mask.plot`: a gallery of all masks, and four of them over four ranks.

Run: ``python docs/draw_masks.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import distflash as df

HERE = Path(__file__).parent
N = 24  # tokens of a picture of the gallery
GALLERY: dict[str, tuple[str, df.Mask]] = {
    "full": ("Full()", df.Full()),
    "causal": ("Causal()", df.Causal()),
    "window": ("Window(6, 2)", df.Window(6, 2)),
    "causal_window": ("Causal() & Window(6)", df.Causal() & df.Window(6)),
    "documents": ("Documents([0, 5, 15, 24])", df.Documents([0, 5, 15, N])),
    "causal_documents": ("Causal() & Documents([0, 5, 15, 24])", df.Causal() & df.Documents([0, 5, 15, N])),
    "prefix_lm": ("PrefixLM(8)", df.PrefixLM(8)),
    "chunked": ("Causal() & Chunked(8)", df.Causal() & df.Chunked(8)),
    "first_tokens": ("Causal() & (Window(5) | FirstTokens(3))", df.Causal() & (df.Window(5) | df.FirstTokens(3))),
    "block_causal": ("BlockCausal(6)", df.BlockCausal(6)),
    "unequal_blocks": ("BlockCausal([0, 2, 9, 16, 24])", df.BlockCausal([0, 2, 9, 16, N])),
    "image_blocks": ("ImageBlocks([4, 14], [6, 7])", df.ImageBlocks([4, 14], [6, 7])),
    "tree": ("Tree([-1, 0, 0, 2], [8, 6, 5, 5])", df.Tree([-1, 0, 0, 2], [8, 6, 5, 5])),
}
ROWS = df.Causal() & df.Rows([df.Documents([0, 5, 15, N]), df.Documents([0, 12, N])])

W, S = 4, 64
OVER_RANKS: dict[str, df.Mask] = {
    "Causal() & (Window(15) | FirstTokens(3))": df.Causal() & (df.Window(15) | df.FirstTokens(3)),
    "ImageBlocks([6, 34], [16, 20])": df.ImageBlocks([6, 34], [16, 20]),
    "Tree([-1, 0, 0, 0, 3, 3], [16, 12, 10, 6, 11, 9])": df.Tree([-1, 0, 0, 0, 3, 3], [16, 12, 10, 6, 11, 9]),
    "BlockCausal([0, 4, 16, 28, 40, 52, 64])": df.BlockCausal([0, 4, 16, 28, 40, 52, 64]),
}


def draw_small(ax: Axes, title: str, mask: df.Mask) -> None:
    """One mask of the gallery, with lines between the tokens."""
    mask.plot(N, ax=ax)
    ax.set_title(title, fontsize=8.5, loc="left")
    ax.set_xlabel("key", fontsize=8), ax.set_ylabel("query", fontsize=8)
    ax.set_xticks(range(N + 1), minor=True), ax.set_yticks(range(N + 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="both", length=0, labelsize=7)


def draw_gallery(folder: Path) -> None:
    """A file for each mask; `Rows` has a panel for each sequence of the batch."""
    folder.mkdir(exist_ok=True)
    for name, (title, mask) in GALLERY.items():
        figure = plt.figure(figsize=(3.2, 3.3), dpi=125, layout="constrained")
        draw_small(figure.add_subplot(), title, mask)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        plt.close(figure)
    figure, panels = plt.subplots(1, 2, figsize=(6.4, 3.3), dpi=125, layout="constrained")
    for n, (ax, mask) in enumerate(zip(panels, ROWS.masks, strict=True)):
        draw_small(ax, f"Causal() & Rows([...]), sequence {n}", mask)
    figure.savefig(folder / "rows.png", metadata={"Software": None})
    plt.close(figure)


def draw_over_ranks() -> None:
    """Four masks over four ranks: who computes which pair."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 9.6), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    for ax, (title, mask) in zip(axes.flat, OVER_RANKS.items(), strict=True):
        mask.plot(S, df.Zigzag(), W, ax=ax)
        ax.set_title(title, fontsize=11, fontweight="bold", loc="left")
    figure.savefig(HERE / "masks.png")
    plt.close(figure)


def main() -> None:
    """Draw and save."""
    draw_gallery(HERE / "masks")
    draw_over_ranks()


if __name__ == "__main__":
    main()
