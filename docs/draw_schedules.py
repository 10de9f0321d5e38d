"""Draws ``docs/schedules/*.png``: what each schedule computes, and what it moves meanwhile.

Run: ``python docs/draw_schedules.py``. The pictures are drawn from the plans themselves: 4 ranks, causal, zigzag.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, Rectangle

import distflash as df
from distflash.geometry import Geometry
from distflash.pictures import BACKGROUND, COLORS
from distflash.plan import Plan, Stage, Transfer, What

W, S, HEADS = 4, 64, 4
PAIRS = S * (S + 1) // 2 / W**2  # of one of W stages, where all have equally many
STAGE = 1.45  # width of PAIRS pairs
EMPTY, WIDE = 1.3, 2.0  # least width of a stage, and of one with long words
COMPUTE, GAP, LANE = 0.36, 0.05, 0.17  # heights
GREY = "#777777"

WORDS = {
    What.KEYS: "K, V",
    What.KEY_GRADIENTS: "dK, dV",
    What.QUERIES: "Q",
    What.QUERY_GRADIENTS: "dQ",
    What.PARTIALS: "state",
}


@dataclass(frozen=True)
class Work:
    """Computation of one rank in one stage, ``share`` times PAIRS."""

    color: str
    text: str
    share: float


@dataclass(frozen=True)
class Flight:
    """What arrives at one rank from the rank ``peer``, from stage ``start`` until stage ``until``."""

    color: str
    text: str
    peer: int
    start: int
    until: int


@dataclass(frozen=True)
class Column:
    """One stage: what each rank computes."""

    title: str
    work: tuple[tuple[Work, ...], ...]
    least: float = EMPTY

    @property
    def width(self) -> float:
        return max(self.least, STAGE * max(sum(work.share for work in of_rank) for of_rank in self.work))


@dataclass(frozen=True)
class Drawing:
    """One direction: stages, and what arrives at each rank."""

    title: str
    columns: tuple[Column, ...]
    flights: tuple[tuple[Flight, ...], ...]

    @property
    def starts(self) -> list[float]:
        return [sum(column.width for column in self.columns[:n]) for n in range(len(self.columns) + 1)]


@dataclass(frozen=True)
class Plans:
    """Plans of all ranks, and the ranks that each rank of a plan stands for: itself, or a group (`Ulysses`)."""

    plans: tuple[Plan, ...]
    groups: tuple[tuple[int, ...], ...]
    backward: bool

    @property
    def stages(self) -> list[tuple[Stage, ...]]:
        return [plan.backward if self.backward else plan.forward for plan in self.plans]

    def columns(self) -> tuple[Column, ...]:
        number = len(self.stages[0])
        return tuple(
            Column(f"stage {n}", tuple(tuple(self._work(rank, stages[n])) for rank, stages in enumerate(self.stages)))
            for n in range(number)
        )

    def flights(self, rank: int, after: int = 0) -> Iterator[Flight]:
        """``after`` so many columns."""
        for n, stage in enumerate(self.stages[rank], after):
            for t in stage.transfers:
                if not t.sends:
                    peer = self.groups[t.peer][self.place(rank)]
                    yield Flight(self._color(t.of), self._words(t), peer, n, t.until + after)

    def place(self, rank: int) -> int:
        return next(members.index(rank) for members in self.groups if rank in members)

    def _work(self, rank: int, stage: Stage) -> Iterator[Work]:
        """Coloured by the source, or by whose queries they are where these are another rank's."""
        here, members = self.plans[rank].rank, len(self.groups[0])
        for each in stage.passes:
            (source,) = each.sources
            color = self._color(source if each.queries == here else each.queries)
            text = f"Q of {self._name(each.queries)}, K, V of {self._name(source)}"
            if members > 1:
                text += f", {heads(self.place(rank))}"
            yield Work(color, text, each.pairs / members / PAIRS)

    def _words(self, t: Transfer) -> str:
        word = "Q, O, dO" if self.backward and t.what is What.QUERIES else WORDS[t.what]
        return f"{word} of {self._name(t.of)}: {t.count} of {self.plans[0].lengths[t.of]}"

    def _name(self, group: int) -> str:
        return "+".join(map(str, self.groups[group]))

    def _color(self, group: int) -> str:
        return COLORS[self.groups[group][0]]


def heads(place: int) -> str:
    """The heads of a rank of a group of two."""
    share = HEADS // 2
    return f"heads {place * share}-{place * share + share - 1}"


def plain(schedule: df.schedules.Schedule, geometry: Geometry, backward: bool) -> Drawing:
    """Of a schedule whose plans are between ranks."""
    of_all = tuple(schedule.plan(geometry, rank) for rank in range(W))
    plans = Plans(of_all, tuple((rank,) for rank in range(W)), backward)
    return Drawing(_title(f"{schedule!r}", backward), plans.columns(), tuple(tuple(plans.flights(r)) for r in range(W)))


def ulysses(schedule: df.Ulysses, geometry: Geometry, backward: bool) -> Drawing:
    """Of two all-to-alls around the plan of the inner schedule, whose ranks are groups."""
    plans = Plans(tuple(schedule.plan(geometry, rank) for rank in range(W)), schedule.groups, backward)
    nothing = Column("all-to-all", ((),) * W)
    columns = tuple(replace(column, least=WIDE) for column in (nothing, *plans.columns(), nothing))
    first, last = ("Q, O, dO, K, V", "dQ, dK, dV") if backward else ("Q, K, V", "O")
    flights = []
    for rank in range(W):
        (peer,) = (r for members in plans.groups if rank in members for r in members if r != rank)
        end = len(columns) - 1
        exchanged = (
            Flight(GREY, f"{first}: {heads(plans.place(rank))}", peer, 0, 1),
            Flight(GREY, f"{last}: {heads(plans.place(peer))}", peer, end, end + 1),
        )
        flights.append((*plans.flights(rank, 1), *exchanged))
    return Drawing(_title("Ulysses(Ring()) on a 2 x 2 mesh", backward), columns, tuple(flights))


def _title(name: str, backward: bool) -> str:
    return f"{name}, {'backward' if backward else 'forward'}"


def draw(ax: Axes, drawing: Drawing, height: float, tab: float) -> None:
    """Stages across, ranks down: above what a rank computes, below arrives meanwhile, its sender in a tab."""
    starts = drawing.starts
    for rank in range(W):
        top = rank * height
        ax.add_patch(Rectangle((0, top), starts[-1], height - GAP, color=BACKGROUND, linewidth=0, zorder=0))
        for number, column in enumerate(drawing.columns):
            left = starts[number]
            for work in column.work[rank]:
                _box(ax, left, STAGE * work.share, top + GAP / 2, COMPUTE - GAP, work.color, work.text)
                left += STAGE * work.share
        for lane, flight in lanes(drawing.flights[rank]):
            left, right = starts[flight.start], starts[flight.until]
            y = top + COMPUTE + lane * LANE
            _box(ax, left, right - left, y, LANE - 0.02, flight.color, flight.text, tab)
            ax.add_patch(Rectangle((left + 0.02, y), tab, LANE - 0.02, color=COLORS[flight.peer], lw=0, zorder=3))
            middle = left + 0.02 + tab / 2, y + LANE / 2 - 0.01
            ax.text(*middle, flight.peer, ha="center", va="center", color="white", fontsize=7, zorder=4)
    _frame(ax, drawing, height)


def lanes(flights: Sequence[Flight]) -> list[tuple[int, Flight]]:
    """A lane for each flight, such that those in a lane follow one another."""
    free: list[int] = []
    placed = []
    for flight in sorted(flights, key=lambda f: (f.start, f.until)):
        lane = next((n for n, until in enumerate(free) if until <= flight.start), len(free))
        free[lane : lane + 1] = [flight.until]
        placed.append((lane, flight))
    return placed


def _box(ax: Axes, left: float, width: float, y: float, height: float, color: str, text: str, tab: float = 0) -> None:
    fill = tuple(1 - 0.22 * (1 - c) for c in to_rgb(color)) if tab else color
    style = "square,pad=0" if tab else "round,pad=0,rounding_size=0.03"
    ax.add_patch(FancyBboxPatch((left + 0.02, y), width - 0.04, height, boxstyle=style, fc=fill, lw=0, zorder=2))
    ink, size = ("#222222", 7) if tab else ("white", 8)
    ax.text(left + width / 2 + tab / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=size)


def _frame(ax: Axes, drawing: Drawing, height: float) -> None:
    starts = drawing.starts
    for x in starts[1:-1]:
        ax.axvline(x, color="white", linewidth=2, zorder=0.5)
    ax.set_ylim(W * height, 0)
    ax.set_xticks([(a + b) / 2 for a, b in pairwise(starts)], [c.title for c in drawing.columns])
    ax.set_yticks([(rank + 0.5) * height for rank in range(W)], [f"rank {rank}" for rank in range(W)])
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=9)
    for rank, label in enumerate(ax.get_yticklabels()):
        label.set_color(COLORS[rank])
    ax.set_title(drawing.title, fontsize=10.5, fontweight="bold", loc="left")
    for spine in ax.spines.values():
        spine.set_visible(False)


def save(name: str, drawings: Sequence[Drawing]) -> None:
    """One picture, its directions one below the other, to one scale."""
    most = [max(lane for of_rank in d.flights for lane, _ in lanes(of_rank)) + 1 for d in drawings]
    heights = [COMPUTE + n * LANE + 2 * GAP for n in most]
    figure, axes = plt.subplots(
        len(drawings), 1, figsize=(11.5, 2.1 * W * sum(heights) / 2 + 1.1), dpi=110, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for ax, drawing, height in zip(axes, drawings, heights, strict=True):
        width = max(d.starts[-1] for d in drawings)
        draw(ax, drawing, height, width / 64)
        ax.set_xlim(0, width)
    folder = Path(__file__).with_name("schedules")
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    plt.close(figure)


def main() -> None:
    """Draw and save all."""
    geometry = Geometry.of_sequence(df.Causal(), df.Zigzag(), S, W)
    schedules = {
        "ring": df.Ring(),
        "all_gather": df.AllGather(chunks=2),
        "double_ring": df.DoubleRing(ranks_per_node=2),
        "pass_query": df.PassQuery(),
    }
    for name, schedule in schedules.items():
        save(name, [plain(schedule, geometry, backward) for backward in (False, True)])
    mesh = df.Ulysses(df.Ring()).on((2, 2))
    save("ulysses", [ulysses(mesh, geometry, backward) for backward in (False, True)])


if __name__ == "__main__":
    main()
