"""Figures of the jobs, without pyplot: it takes a second to import, and would set the backend of the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one plot, in inches; `Figure.savefig` writes it."""
    from matplotlib.figure import Figure  # imported here because only rank 0 draws

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()
