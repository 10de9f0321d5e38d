"""Plots of records, in one style, made from the record only.

To draw them again, on any machine:

    python -m benchmarks.redraw
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Draws a record, as `common.save` writes it, on a matplotlib figure.
Draw = Callable[[Any, dict[str, Any]], None]

# What the names in records are called in pictures. Records keep theirs, so that old ones can be compared with new ones.
WORDS = {
    "ring": "distflash",
    "single": "one GPU",
    "distflash, portable": "distflash, Triton kernel",
    "distflash, bare": "distflash, kernel alone",
    "SDPA cuDNN": "cuDNN (SDPA)",
    "SDPA flash": "FlashAttention-2 (SDPA)",
    "distflash, one of 2": "distflash, one rank of 2",
    "distflash, one of 8": "distflash, one rank of 8",
    "cudnn on one GPU": "cuDNN on one GPU",
    "zigzag on flash-attn-4": "zigzag ring over flash-attn-4",
    "torch, all-gather": "torch context_parallel, all-gather",
    "torch, all-to-all": "torch context_parallel, all-to-all",
    "plain PyTorch": "plain\nPyTorch",
    "window4096": "window of 4K",
    "documents": "packed documents",
    "streaming": "window of 4K and the first 4 tokens",
    "rollouts": "rollouts over one prompt",
    "blocks": "block-causal documents",
    "window4096+documents": "window of 4K in packed documents",
}
SHAPE = re.compile(r"B(\d+) S(\d+) H(\d+)(?:/(\d+))? D(\d+)(?:/(\d+))?")


def save(record: dict[str, Any], draw: Draw, file: Path) -> None:
    """Draw a record, with a line that says where it was measured, and write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(layout="constrained")
    draw(figure, record)
    env = record["environment"]
    hardware = f"{len(env['gpus'])} x {env['gpus'][0]}" if env["gpus"] else env["cpu"]
    note = f"{hardware}, torch {env['torch']}, triton {env['triton']}, sources {env['sources']}"
    figure.supxlabel(note, fontsize=8, color="#666666")
    # Only the picture itself: another version of matplotlib is no reason for another file.
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def plain_axes(axes: Any, title: str, y: str, x: str = "") -> None:
    """The look of all plots."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel(y)
    axes.set_xlabel(x)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(frameon=False, fontsize=9)


def log_lengths(axes: Any, lengths: list[int]) -> None:
    """An axis of sequence lengths, each of them marked."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, list(map(tokens, lengths)))


def log_values(axes: Any) -> None:
    """A logarithmic y axis with numbers written out, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def legend_above(figure: Any, axes: Any, columns: int) -> None:
    """One legend for all panels."""
    for each in figure.axes:
        if each.get_legend() is not None:
            each.get_legend().remove()
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def word(name: str) -> str:
    """A candidate's or mask's name as pictures have it."""
    return WORDS.get(name, name)


def tokens(count: int) -> str:
    """A number of tokens, short."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def shape(text: str) -> str:
    """``str(Shape)`` in words."""
    found = SHAPE.fullmatch(text)
    if found is None:
        return text
    batch, length, heads, kv_heads, dim, value_dim = found.groups()
    sequences = "" if batch == "1" else f"{batch} x "
    pooled = f"{heads} heads" if kv_heads is None else f"{heads}:{kv_heads} heads"
    return f"{sequences}{tokens(int(length))} tokens, {pooled}, D{dim}" + (f"/{value_dim}" if value_dim else "")
