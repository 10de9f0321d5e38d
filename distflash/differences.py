"""The report of `verify`: one row per compared value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite

# The error bound in standard deviations. A replay with nudged weights is one sample of the effect of rounding, and
# estimates one standard deviation.
SIGMAS = 4
# Rows of a printed table; fewer if the step is verified.
SHOWN, SHOWN_VERIFIED = 10, 3

HOW = (
    f"bound: {SIGMAS} x (nudged + rounding). nudged: the change of the unsharded replay if every weight moves by one "
    "unit in the last place"
)


@dataclass(frozen=True)
class Row:
    """The sharded against the unsharded value of one tensor.

    Attributes:
        kind: "loss", "output", "layer", "gradient" or "ranks" (the same replay on different ranks).
        name: of the module or parameter.
        largest: the largest absolute difference of any element.
        error: the 2-norm of the difference.
        size: the 2-norm of the unsharded value.
        bound: the largest error that rounding explains.
    """

    kind: str
    name: str
    largest: float
    error: float
    size: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains the error. False for NaN."""
        return self.error <= self.bound

    @property
    def excess(self) -> float:
        """The error in units of the bound; infinite for NaN."""
        if not isfinite(self.error) or not isfinite(self.bound):
            return inf
        return self.error / self.bound if self.bound > 0 else (inf if self.error > 0 else 0.0)


@dataclass(frozen=True)
class Report:
    """The result of `verify`, the same on every rank.

    Attributes:
        rows: the loss, outputs and gradients; if any differs, also every layer, in the order of execution.
        first: the first layer that differs, in the order of execution; None if none was found.
        not_finite: the first value that is NaN or infinite, and where; None if all are finite.
        notes: assumptions, and values that could not be compared.

    Examples:
        >>> layer = torch.nn.Linear(4, 4)
        >>> def step(batch, cp):
        ...     return layer(batch).square().mean()
        >>> report = df.verify(step, torch.ones(1, 4), df.ContextParallel(df.transport.Alone()), quiet=True)
        >>> report.ok, [f"{row.kind} {row.name}".strip() for row in report.rows]
        (True, ['loss', 'output model', 'gradient weight', 'gradient bias'])
        >>> report.require()
    """

    rows: tuple[Row, ...]
    first: str | None = None
    not_finite: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every difference is explained by rounding, and everything is finite."""
        return self.not_finite is None and all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row whose error is the largest in units of its bound."""
        return max(self.rows, key=lambda row: row.excess)

    def require(self) -> None:
        """Raise if the step is not verified.

        Raises:
            ValueError: on every rank, with the whole report.
        """
        if not self.ok:
            raise ValueError(str(self))

    def __str__(self) -> str:
        count, gap = (SHOWN_VERIFIED, []) if self.ok else (SHOWN, [""])
        shown = sorted(self.rows, key=lambda row: row.excess, reverse=True)[:count]
        lines = [self._headline(), *gap, *_table(shown)]
        if len(self.rows) > len(shown):
            lines.append(f"... and {len(self.rows) - len(shown)} more whose error is smaller by its bound")
        return "\n".join([*lines, HOW, *(f"note: {note}" for note in self.notes)])

    def _headline(self) -> str:
        worst = self.worst
        if self.ok:
            return (
                f"verified: sharded and unsharded agree in {len(self.rows)} values; the largest error is "
                f"{worst.excess:.2f} of its bound ({worst.kind} {worst.name})"
            )
        lines = [f"NOT VERIFIED: {sum(not row.ok for row in self.rows)} of {len(self.rows)} values differ"]
        if self.first is not None:
            lines.append(f"first layer that differs: {self.first}")
        if self.not_finite is not None:
            lines.append(f"first value that is not finite: {self.not_finite}")
        return "\n".join(lines)


def _table(rows: Iterable[Row]) -> list[str]:
    cells: list[tuple[str, ...]] = [("", "value", "largest", "error", "size", "bound", "error/bound")]
    for row in rows:
        numbers = (f"{x:.1e}" for x in (row.largest, row.error, row.size, row.bound))
        cells.append(("" if row.ok else "X", f"{row.kind} {row.name}".strip(), *numbers, f"{row.excess:.3g}"))
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    aligned = ("<", "<", *">" * (len(widths) - 2))
    return [
        "  ".join(f"{cell:{way}{width}}" for cell, way, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in cells
    ]
