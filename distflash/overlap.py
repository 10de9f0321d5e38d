"""From plan to plan: the same result by passes that a kernel computes faster, or under which more can travel.

Each function takes a plan as a schedule made it and returns another, or the same one where nothing is gained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from distflash.kernels.base import Abilities
from distflash.liveness import all_rows, groups_that_see, live_rows
from distflash.plan import Gradients, Pass, Plan, Stage, What

# Of the key heads, those computed before the first keys arrive: enough to cover an exchange between ranks of one host.
SHARE_FIRST = 0.25


def overlap(plan: Plan, kv_heads: int, batch: int, abilities: Abilities, near: bool) -> Plan:
    """The plan for a kernel with these abilities.

    Args:
        plan: as a schedule made it.
        kv_heads: key heads of this rank.
        batch: the batch size.
        abilities: the kernel's.
        near: whether all ranks are on one host, where keys travel much faster than they are worked on.
    """
    some = math.ceil(kv_heads * SHARE_FIRST)
    held_back = near and abilities.some_heads and abilities.two_sources and some < kv_heads
    forward = hold_back(plan.forward, plan.rank, some) if held_back else plan.forward
    forward = two_at_once(forward) if abilities.two_sources else forward
    if not plan.moves_queries:  # states that travel are whole
        forward = leave_rows_out(forward)
    backward = plan.backward
    enough = batch * plan.lengths[plan.rank] * some >= abilities.enough_keys
    if held_back and enough:
        backward = hold_back_to_the_end(backward, plan.rank, some, kv_heads)
    elif abilities.separate_gradients:
        backward = keys_last(backward) if plan.moves_queries else queries_last(backward)
    return replace(plan, forward=forward, backward=backward)


def hold_back(stages: Sequence[Stage], rank: int, some: int) -> tuple[Stage, ...]:
    """Forward: in the first stage only ``some`` key heads attend to the rank's own keys; the others wait.

    They take their own and the first remote keys in one pass, with nothing kept in between.
    """
    stages = tuple(stages)
    if len(stages) < 2 or not _alone(stages[0], rank) or not _alone(stages[1]):
        return stages
    (own,), (other,) = stages[0].passes, stages[1].passes
    if own.queries != other.queries:
        return stages
    both = replace(
        other, sources=own.sources + other.sources, visible=own.visible + other.visible, begun=some, first=own.first
    )
    first = replace(stages[0], passes=(replace(own, heads=range(some)),))
    return first, replace(stages[1], passes=(both,)), *stages[2:]


def two_at_once(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Forward: of a stage's passes over the same queries, every two become one over two sources."""
    return tuple(replace(stage, passes=_paired(stage.passes)) for stage in stages)


def leave_rows_out(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Forward: rows are worked on only in passes in which they see a key. See `distflash.liveness`."""
    passes = [each for stage in stages for each in stage.passes]
    # Intervals that heads take in different passes are one visit.
    visits = {id(rows): rows for each in passes for rows in each.visible}
    if len(visits) < 2:
        return tuple(stages)
    numbers = {name: n for n, name in enumerate(visits)}
    seen = torch.stack([groups_that_see(rows.row_lo, rows.row_hi) for rows in visits.values()])

    def changed(each: Pass) -> Pass:
        of_pass = [numbers[id(rows)] for rows in each.visible]
        begun, rows = each.begun > 0, each.visible[0].row_lo
        live = live_rows(seen, range(of_pass[0], of_pass[-1] + 1), begun, len(rows))
        flags = torch.full(seen.shape[1:], all_rows(each.first, each.last, begun))
        return each if torch.equal(live.groups[:, 1], flags.int()) else replace(each, live=live.to(rows.device))

    return tuple(replace(stage, passes=tuple(map(changed, stage.passes))) for stage in stages)


def hold_back_to_the_end(stages: Sequence[Stage], rank: int, some: int, kv_heads: int) -> tuple[Stage, ...]:
    """Backward: all but ``some`` key heads work on the rank's own keys last, while the last gradients travel.

    Not where gradients of other ranks are added to the own ones before, or other ranks' queries add to them: the heads
    that come last would overwrite them.
    """
    stages = tuple(stages)
    passes = [each for stage in stages for each in stage.passes]
    if len(passes) < 2 or any(each.queries != rank for each in passes):
        return stages
    if not _alone(stages[0], rank) or stages[-1].passes or _added_before_the_end(stages):
        return stages
    (own,) = stages[0].passes
    first = replace(stages[0], passes=(replace(own, heads=range(some)),))
    rest = replace(own, heads=range(some, kv_heads), first=False, last=True)
    middle = [replace(s, passes=tuple(replace(each, last=False) for each in s.passes)) for s in stages[1:-1]]
    return first, *middle, replace(stages[-1], passes=(rest,))


def queries_last(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Backward: dQ of the last pass is computed while the last gradients of keys travel."""
    return _last_in_two(stages, Gradients.OF_KEYS, Gradients.OF_QUERIES)


def keys_last(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Backward: dK and dV of the last pass are computed while the last gradients of queries travel."""
    return _last_in_two(stages, Gradients.OF_QUERIES, Gradients.OF_KEYS)


def _last_in_two(stages: Sequence[Stage], first: Gradients, second: Gradients) -> tuple[Stage, ...]:
    stages = tuple(stages)
    if len(stages) < 2 or stages[-1].passes or not stages[-2].passes:
        return stages
    *before, last = stages[-2].passes
    one, other = (replace(last, gradients=which) for which in (first, second))
    return *stages[:-2], replace(stages[-2], passes=(*before, one)), replace(stages[-1], passes=(other,))


def _alone(stage: Stage, source: int | None = None) -> bool:
    """Whether a stage has one pass, of one source, and of this one if given."""
    if len(stage.passes) != 1 or len(stage.passes[0].sources) != 1:
        return False
    return source is None or stage.passes[0].sources == (source,)


def _added_before_the_end(stages: Sequence[Stage]) -> bool:
    """Whether gradients of keys arrive before the last stage begins."""
    arriving = [t for stage in stages for t in stage.transfers if t.what is What.KEY_GRADIENTS and not t.sends]
    return any(transfer.until < len(stages) for transfer in arriving)


def _paired(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    paired: list[Pass] = []
    for each in passes:
        before = paired[-1] if paired else None
        if before and before.queries == each.queries and len(before.sources) == len(each.sources) == 1:
            two = before.sources + each.sources, before.visible + each.visible
            paired[-1] = replace(before, sources=two[0], visible=two[1], last=each.last)
        else:
            paired.append(each)
    return tuple(paired)
