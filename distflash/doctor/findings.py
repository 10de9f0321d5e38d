"""Findings of one rank, and tables of the findings of all ranks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

COLUMNS = ("check", "ranks", "result", "")


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was checked.
        result: for example a version, a bandwidth, an error relative to its bound, or an error message.
        remedy: what to do; empty if nothing is wrong.
        amount: a number to order results of several ranks by; only the largest is shown. None: all are shown.
        same: whether all ranks must have the same result.
    """

    check: str
    result: str
    remedy: str = ""
    amount: float | None = None
    same: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.remedy


def to_json(findings: Sequence[Finding]) -> str:
    """Findings as JSON, to send to other ranks."""
    return json.dumps([asdict(finding) for finding in findings])


def from_json(text: str) -> list[Finding]:
    """The inverse of `to_json`."""
    return [Finding(**finding) for finding in json.loads(text)]


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[tuple[Finding, str]]:
    """Equal findings of several ranks as one line with the list of ranks, in the order of the checks."""
    order: dict[str, int] = {}
    alike: dict[tuple[str, str, str], list[tuple[int, Finding]]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            order.setdefault(finding.check, len(order))
            result = finding.result if finding.amount is None else ""
            alike.setdefault((finding.check, finding.remedy, result), []).append((rank, finding))
    lines = []
    for found in alike.values():
        _, shown = max(found, key=lambda each: each[1].amount or 0.0)
        if shown.same and len(found) < len(by_rank):
            shown = replace(shown, remedy=shown.remedy or "install the same version for every rank")
        lines.append((shown, "all" if len(found) == len(by_rank) else ", ".join(str(rank) for rank, _ in found)))
    return sorted(lines, key=lambda line: order[line[0].check])


def print_table(title: str, lines: Sequence[tuple[Finding, str]]) -> None:
    """Print a table with rich if it is installed, else as plain text."""
    cells = [(f.check, ranks, f.result, "ok" if f.ok else "FAULT") for f, ranks in lines]
    remedies = dict.fromkeys(f"{f.check}: {f.remedy}" for f, _ in lines if not f.ok)
    if importlib.util.find_spec("rich") is not None:
        _print_rich(title, cells)
    else:
        print("\n".join(["", title, *plain_table([COLUMNS, *cells])]))
    for remedy in remedies:
        print(f"  what to do about {remedy}", flush=True)


def _print_rich(title: str, cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for line in cells:
        style = "bold red" if line[-1] == "FAULT" else ""
        table.add_row(*(Text(cell, style=style) for cell in line))
    Console().print(table)


def plain_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned to the left."""
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
