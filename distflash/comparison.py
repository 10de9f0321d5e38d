"""Compares the sharded with the unsharded run, value by value, with error bounds from rounding."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from distflash import collectives
from distflash.context import ContextParallel
from distflash.differences import SIGMAS, Report, Row
from distflash.rank_texts import gather_texts
from distflash.recording import Event, Run
from distflash.transport import Transport


@dataclass
class Sums:
    """Sums of squares for the comparison of one value, of one rank or of all.

    Attributes:
        error: squared 2-norm of the sharded minus the unsharded value.
        size: squared 2-norm of the unsharded value.
        nudged: squared 2-norm of the nudged minus the unsharded value.
        product: the inner product of the sharded and the unsharded value.
        largest: the largest absolute difference.
        stored: squared 2-norm of everything that is rounded when stored: the value, or each rank's part of it.
        unit: unit roundoff of the dtype in which it is stored.
        wide: unit roundoff of the dtype in which it is summed.
        bad: the number of elements of the sharded value that are not finite.
        first_bad: the smallest global position of such an element, -1 if unknown.
        compared: False if only ``bad`` is known.
    """

    error: float = 0.0
    size: float = 0.0
    nudged: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    stored: float = 0.0
    unit: float = 0.0
    wide: float = 0.0
    bad: int = 0
    first_bad: int = -1
    compared: bool = True

    @staticmethod
    def of(sharded: Tensor, unsharded: Tensor, nudged: Iterable[Tensor]) -> Sums:
        exact, found = unsharded.double(), sharded.double()
        delta = found - exact
        return Sums(
            error=float(delta.square().sum()),
            size=(size := float(exact.square().sum())),
            stored=size,
            nudged=max(float((x.double() - exact).square().sum()) for x in nudged),
            product=float((found * exact).sum()),
            largest=float(delta.abs().max()) if delta.numel() else 0.0,
            unit=_unit(unsharded.dtype),
            wide=_unit(torch.promote_types(unsharded.dtype, torch.float32)),
            bad=int((~sharded.isfinite()).sum()),
        )

    def plus(self, other: Sums) -> Sums:
        """The sums over the tokens of both."""
        positions = [position for position in (self.first_bad, other.first_bad) if position >= 0]
        return Sums(
            error=self.error + other.error,
            size=self.size + other.size,
            stored=self.stored + other.stored,
            nudged=self.nudged + other.nudged,
            product=self.product + other.product,
            largest=self.largest + other.largest if self.largest != self.largest else max(other.largest, self.largest),
            unit=max(self.unit, other.unit),
            wide=max(self.wide, other.wide),
            bad=self.bad + other.bad,
            first_bad=min(positions, default=-1),
            compared=self.compared or other.compared,
        )

    def row(self, kind: str, name: str, scale: float | None = None) -> Row:
        """A row of the report. scale: 2-norm of the terms whose sum the value is; by default the value's own."""
        size = self.size**0.5
        rounding = self.unit * self.stored**0.5 + self.wide * (size if scale is None else scale)
        return Row(kind, name, self.largest, self.error**0.5, size, SIGMAS * (self.nudged**0.5 + rounding))


@dataclass
class Tables:
    """The sums of one rank, which are sent to all others."""

    loss: Sums
    replayed: float
    returned: list[Sums]
    gradients: dict[str, Sums]
    events: dict[Event, Sums]

    def to_json(self) -> str:
        parts = (self.loss, self.replayed, self.returned, self.gradients)
        return json.dumps([*map(_plain, parts), [(astuple(event), asdict(s)) for event, s in self.events.items()]])

    @staticmethod
    def from_json(text: str) -> Tables:
        loss, replayed, returned, gradients, events = json.loads(text)
        return Tables(
            Sums(**loss),
            replayed,
            [Sums(**s) for s in returned],
            {name: Sums(**s) for name, s in gradients.items()},
            {Event(*event): Sums(**s) for event, s in events},
        )


@dataclass
class Comparison:
    """Compares one rank's runs. All ranks make the same calls.

    Attributes:
        ranks: over which gradients are reduced: ``cp``'s ranks, or more with data parallelism.
        reduction: of gradients, see `distflash.verification`.
    """

    cp: ContextParallel
    ranks: Transport
    reduction: str | None
    sharded: Run
    unsharded: Run
    nudged: list[Run]
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Tables]:
        """Every rank's sums."""
        mine = Tables(
            loss=Sums.of(self.sharded.loss, self.unsharded.loss, [run.loss for run in self.nudged]),
            replayed=float(self.unsharded.loss),
            returned=self._returned(),
            gradients=self._gradients(),
            events=self._events(),
        )
        return [Tables.from_json(text) for text in gather_texts(mine.to_json(), self.ranks)]

    def _gradients(self) -> dict[str, Sums]:
        expected, found = self.unsharded.gradients, self.sharded.gradients
        if found.keys() != expected.keys():
            names = sorted(found.keys() ^ expected.keys())
            raise ValueError(
                f"step: the sharded run and the replay have gradients of different parameters, among them {names[:4]}; "
                "train the same model in both"
            )
        how = self._how_gradients_are_combined()
        W = self.ranks.world_size

        def combined(gradient: Tensor) -> Tensor:
            if how == "already" or W == 1:
                return gradient
            total = self.ranks.all_reduce(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
            return total / W if how == "mean" else total

        factor = 1 / W if how == "mean" or (how == "already" and self.sharded.averaged) else 1.0
        sums = {}
        for name, gradient in found.items():
            s = Sums.of(combined(gradient), expected[name], [run.gradients[name] for run in self.nudged])
            parts = [(factor * self.sharded.parts.get(name, 0.0)) ** 2, s.size / W]
            # Under autocast a gradient is rounded to the compute dtype before it is stored.
            sums[name] = replace(s, stored=max(parts), unit=self.sharded.eps / 2)
        return sums

    def _how_gradients_are_combined(self) -> str:
        """The caller's reduction; else "already" if all ranks have the same gradients, else "sum"."""
        if self.reduction is not None or self.ranks.world_size == 1 or not self.sharded.gradients:
            return self.reduction or "already"
        prints = {
            name: [float(g.double().sum()), float(g.double().norm())] for name, g in self.sharded.gradients.items()
        }
        everyone = [json.loads(text) for text in gather_texts(json.dumps(prints), self.ranks)]
        elements = {True: 0, False: 0}
        for name, gradient in self.sharded.gradients.items():
            marks = [json.dumps(rank[name]) for rank in everyone]
            if any(rank[name][1] != 0 for rank in everyone):
                elements[len(set(marks)) == 1] += gradient.numel()
        if elements[True] >= elements[False]:
            return "already"
        self.notes.append(
            "step left a part of the gradients on every rank; they were added up here. Say reduction='sum' or 'mean', "
            "as your training combines them"
        )
        return "sum"

    def _returned(self) -> list[Sums]:
        """The sums of tensors that step returned. Unsharded ones are cut to this rank's tokens if needed."""
        sums = []
        for n, found in enumerate(self.sharded.returned):
            values = [run.returned[n] for run in (self.unsharded, *self.nudged) if n < len(run.returned)]
            cut = [self._cut(x, found) for x in values]
            if len(cut) > len(self.nudged) and all(x.shape == found.shape for x in cut):
                sums.append(Sums.of(found, cut[0], cut[1:]))
            else:
                sums.append(Sums(compared=False, bad=int((~found.isfinite()).sum())))
        return sums

    def _events(self) -> dict[Event, Sums]:
        sums = {}
        for event, found in self.sharded.events.items():
            values = [run.events[event] for run in (self.unsharded, *self.nudged) if event in run.events]
            cut = [self._cut(x, found) for x in values]
            # Equal shapes in both runs: not a tensor per token, but for example statistics of a rank.
            tokens = self.cp.world_size == 1 or any(x.shape != found.shape for x in values)
            if len(cut) > len(self.nudged) and tokens and all(x.shape == found.shape for x in cut):
                sums[event] = Sums.of(found, cut[0], cut[1:])
            else:
                sums[event] = Sums(compared=False, bad=int((~found.isfinite()).sum()))
            sums[event].first_bad = self._first_bad(found, values)
        return sums

    def _cut(self, whole: Tensor, local: Tensor) -> Tensor:
        """This rank's tokens of ``whole``, along the dimension in which the shapes differ."""
        dim = _token_dim(whole, local)
        if dim is None or self.cp.world_size == 1:
            return whole
        tokens = self._seq_len or whole.shape[dim]
        if whole.shape[dim] % max(tokens, 1):
            return whole
        ranges = self.cp.layout.ranges(tokens, self.cp.world_size, self.cp.rank)
        # The dimension may be batch * tokens.
        apart = whole.unflatten(dim, (whole.shape[dim] // tokens, tokens))
        return collectives.take(apart, dim + 1, ranges).flatten(dim, dim + 1)

    @cached_property
    def _seq_len(self) -> int:
        """The global length: the first dimension after the batch in which the runs differ; 0 if there is none."""
        for event, local in self.sharded.events.items():
            whole = self.unsharded.events.get(event)
            if whole is not None and (_token_dim(whole, local) or 0) > 0:
                return whole.shape[_token_dim(whole, local) or 0]
        return 0

    def _first_bad(self, found: Tensor, values: list[Tensor]) -> int:
        """The smallest global position of a value that is not finite; -1 if there is none or it is unknown."""
        bad = ~found.isfinite()
        dim = _token_dim(values[0], found) if values else None
        if dim is None or not bad.any() or found.shape[dim] != self.cp.seq_local(values[0].shape[dim]):
            return -1
        local = bad.transpose(0, dim).flatten(1).any(1) if bad.dim() > 1 else bad
        return int(self.cp.positions(values[0].shape[dim], "cpu")[local].min())


def judge(tables: list[Tables], notes: list[str]) -> Report:
    """The report from all ranks' sums, the same on every rank."""
    events, gradients = _over_ranks(tables), _gradient_rows(tables)
    rows = _loss_rows(tables)
    for n in range(min(len(table.returned) for table in tables)):
        parts = [table.returned[n] for table in tables if table.returned[n].compared]
        rows += [_worst([part.row("output", f"returned[{n}]") for part in parts])] if parts else []
    rows += [_event_row(event, sums) for event, sums in events.items() if sums.compared and event.returned]
    not_finite = _first_not_finite(events, gradients, tables)
    if not_finite is None and not all(row.ok for row in rows if row.kind == "ranks"):
        notes = [*notes, "the replays of different ranks differ: give every rank the same batch and weights"]
    if (factor := _common_factor(tables, gradients)) is not None:
        notes = [*notes, f"all gradients are {factor:.4g} times what they should be: see reduction= of cp.mean"]
    if events and not any(sums.compared for sums in events.values()):
        notes = [
            *notes,
            "no module's output was compared: the replay's have no dimension with more tokens than a rank's",
        ]
    first = _first_difference(events, rows, gradients)
    return Report((*rows, *gradients), first, not_finite, tuple(notes))


def _loss_rows(tables: list[Tables]) -> list[Row]:
    losses = [table.loss.row("loss", "") for table in tables]
    if len(tables) == 1:
        return losses
    values = [table.replayed for table in tables]
    spread, bound = max(values) - min(values), max(row.bound for row in losses)
    return [_worst(losses), Row("ranks", "the replay's loss", spread, spread, abs(values[0]), bound)]


def _first_difference(events: dict[Event, Sums], rows: list[Row], gradients: list[Row]) -> str | None:
    """The first layer that differs in forward; else, for backward, the last parameter that is wrong."""
    for event, sums in events.items():
        if sums.compared and not _event_row(event, sums).ok:
            return event.where
    if not all(row.ok for row in rows if row.kind == "loss"):
        return "the loss: no layer's output differs; look at labels, their shift at the ends of shards, and the mean"
    if any(row.ok for row in gradients):
        return next((f"backward of {_module(row.name)}" for row in reversed(gradients) if not row.ok), None)
    return None


def _over_ranks(tables: list[Tables]) -> dict[Event, Sums]:
    total: dict[Event, Sums] = {}
    for table in tables:
        for event, sums in table.events.items():
            total[event] = total[event].plus(sums) if event in total else sums
    return total


def _event_row(event: Event, sums: Sums) -> Row:
    return sums.row("layer" if event.module else "output", event.name)


def _gradient_rows(tables: list[Tables]) -> list[Row]:
    """Rows of gradients. Their bounds use the largest gradient, since small ones may be differences of large terms."""
    scale = max((sums.size**0.5 for table in tables for sums in table.gradients.values()), default=0.0)
    rows = []
    for name in tables[0].gradients:
        sums = [table.gradients[name] for table in tables]
        stored = sum(s.stored for s in sums)  # every rank's part is rounded before the reduction
        rows.append(_worst([replace(s, stored=stored).row("gradient", name, scale) for s in sums]))
    return rows


def _common_factor(tables: list[Tables], gradients: list[Row]) -> float | None:
    """The common factor by which all gradients are wrong; None if there is none."""
    sums = [s for s in tables[0].gradients.values() if s.size > 0]
    if not sums or any(row.ok and row.size > 0 for row in gradients):
        return None
    factors = [s.product / s.size for s in sums]
    same = all(abs(factor - factors[0]) <= 0.01 * abs(factors[0]) for factor in factors)
    left = all(s.error <= 1.01 * (factors[0] - 1) ** 2 * s.size for s in sums)
    return factors[0] if same and left else None


def _first_not_finite(events: dict[Event, Sums], gradients: list[Row], tables: list[Tables]) -> str | None:
    for event, sums in events.items():
        if sums.bad:
            place = f", from token {sums.first_bad} on" if sums.first_bad >= 0 else ""
            return (
                f"{event.where} ({sums.bad} elements{place}). Attention hands a NaN or infinity on to other tokens of "
                "its tile, those of other packed documents among them"
            )
    if any(table.loss.bad for table in tables):
        return "the loss"
    bad = {name for table in tables for name, sums in table.gradients.items() if sums.bad}
    return next((f"the gradient of {row.name}" for row in reversed(gradients) if row.name in bad), None)


def _worst(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: row.excess)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _token_dim(whole: Tensor, local: Tensor) -> int | None:
    """The dimension in which the shapes differ; None unless there is exactly one."""
    if whole.dim() != local.dim():
        return None
    differing = [dim for dim in range(whole.dim()) if whole.shape[dim] != local.shape[dim]]
    return differing[0] if len(differing) == 1 else None


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _plain(value: object) -> object:
    if isinstance(value, Sums):
        return asdict(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value
