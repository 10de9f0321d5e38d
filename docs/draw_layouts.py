"""Draws ``docs/layouts/*.png``: which tokens each rank holds, and which pairs it computes, by `Mask.plot`.

Run: ``python docs/draw_layouts.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import distflash as df

W, S = 4, 32
MASKS: dict[str, df.Mask] = {
    "causal": df.Causal(),
    "a window of 6": df.Causal() & df.Window(5),
    "packed documents": df.Causal() & df.Documents([0, 3, 17, 21, 24, S]),
}
LAYOUTS: dict[str, df.Layout] = {
    "contiguous": df.Contiguous(),
    "zigzag": df.Zigzag(),
    "striped": df.Striped(),
    "balanced": df.Balanced(chunk=1),  # the sequence of a picture is short
}


def draw(name: str, layout: df.Layout, folder: Path) -> None:
    """A panel for each mask, with the work of each rank below it."""
    figure, panels = plt.subplots(1, len(MASKS), figsize=(10.5, 4.1), dpi=110, layout="constrained")
    for ax, (words, mask) in zip(panels, MASKS.items(), strict=True):
        mask.plot(S, layout.under(mask), W, ax=ax)
        shares = [text.get_text().split(": ")[1].rstrip("%") for text in ax.get_legend().get_texts()]
        ax.get_legend().remove()
        ax.set_title(words, fontsize=11, loc="left")
        ax.set_xlabel("key\n% of the pairs, by rank:  " + "  ".join(f"{float(x):.0f}" for x in shares), fontsize=9)
        ax.set_ylabel("query", fontsize=9)
    figure.suptitle(f"{name.capitalize()}, {S} tokens on {W} ranks", fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw and save all."""
    folder = Path(__file__).with_name("layouts")
    folder.mkdir(exist_ok=True)
    for name, layout in LAYOUTS.items():
        draw(name, layout, folder)


if __name__ == "__main__":
    main()
