"""Draws ``docs/packing.png``: each rank's share of the work on packed documents, under `Zigzag` and under `Balanced`.

Run: ``python -m docs.draw_packing`` in the project's folder.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import distflash as df
from benchmarks.packing import counted
from benchmarks.workloads import corpus

W, TOKENS, SEED = 8, 8192, 0
LAYOUTS = {"Zigzag": df.Zigzag(), "Balanced": df.Balanced()}


def main() -> None:
    """Draw and save."""
    S = W * TOKENS
    mask = corpus(S, SEED)
    figure, rows = plt.subplots(2, 2, figsize=(11, 5), dpi=110, layout="constrained", width_ratios=(2, 3), sharey="col")
    for (shares, places), (name, layout) in zip(rows, LAYOUTS.items(), strict=True):
        found = counted(mask, layout.under(mask), S, W)
        colors = [f"C{rank}" for rank in range(W)]
        shares.bar(range(W), found["shares"], color=colors)
        shares.axhline(1, color="#666666", lw=0.8)
        shares.set_title(f"{name}: pairs of each rank, 1 is the mean", fontsize=10, loc="left")
        shares.set_xticks(range(W), range(W), fontsize=9)
        shares.set_xlabel("rank")
        for rank in range(W):
            runs = layout.under(mask).ranges(S, W, rank)
            places.broken_barh([(run.start, len(run)) for run in runs], (rank - 0.4, 0.8), color=colors[rank])
        for end in mask.second.cu_seqlens:  # type: ignore[attr-defined]
            places.axvline(end, color="#999999", lw=0.4)
        places.set_title(f"tokens of each rank; {found['moved']:.2f} S keys move", fontsize=10, loc="left")
        places.set_ylabel("rank")
        places.set_yticks(range(W))
        places.set_xlim(0, S), places.set_ylim(W - 0.5, -0.5)
        places.set_xticks(range(0, S + 1, 2 * TOKENS), [f"{n // 1024}K" for n in range(0, S + 1, 2 * TOKENS)])
        for axes in (shares, places):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("packing.png"))


if __name__ == "__main__":
    main()
