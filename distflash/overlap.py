"""Rewrites of a plan for a kernel that keep its result: fewer passes, more overlap with communication, and tables.

Each function takes the stages of a plan and returns new ones, or the same ones if nothing is gained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from distflash.chunkwise_plan import ChunkwisePlan
from distflash.kernels.base import Abilities
from distflash.liveness import all_rows, groups_that_see, live_rows
from distflash.plan import Gradients, Pass, Plan, Stage, What
from distflash.turns import turns_of

# Fraction of the key heads computed before the first remote keys arrive; sized to cover one exchange within a node.
FIRST_HEADS = 0.25


def overlap(plan: Plan, kv_heads: int, batch: int, abilities: Abilities, intra_node: bool) -> Plan:
    """The plan for a kernel with these abilities.

    Args:
        plan: as a schedule made it.
        kv_heads: key heads of this rank.
        batch: the batch size.
        abilities: the kernel's.
        intra_node: whether all ranks are on one host, where an exchange takes much less time than a pass.
    """
    if isinstance(plan, ChunkwisePlan):  # its kernel calls must be the same on any number of ranks
        return plan
    first_heads = math.ceil(kv_heads * FIRST_HEADS)
    splits_heads = intra_node and abilities.some_heads and abilities.two_sources and first_heads < kv_heads
    forward = defer_heads(plan.forward, plan.rank, first_heads) if splits_heads else plan.forward
    forward = fuse_passes(forward) if abilities.two_sources else forward
    if not plan.moves_queries:  # partial states that are sent need all rows
        forward = skip_rows(forward)
    backward = plan.backward
    enough = batch * plan.lengths[plan.rank] * first_heads >= abilities.smallest_work
    if splits_heads and enough:
        backward = defer_heads_to_the_end(backward, plan.rank, first_heads, kv_heads)
    elif abilities.separate_gradients:
        backward = defer_dkv(backward) if plan.moves_queries else defer_dq(backward)
    if abilities.ordered_blocks is not None:
        backward = with_turns(backward, *abilities.ordered_blocks)
    return replace(plan, forward=forward, backward=backward)


def defer_heads(stages: Sequence[Stage], rank: int, first_heads: int) -> tuple[Stage, ...]:
    """Forward: in the first stage only the first ``first_heads`` key heads attend to the rank's local keys.

    The other heads attend to the local and the first remote keys in one pass of the second stage, so they keep no
    state between the two sources.
    """
    stages = tuple(stages)
    if len(stages) < 2 or not _alone(stages[0], rank) or not _alone(stages[1]):
        return stages
    (own,), (other,) = stages[0].passes, stages[1].passes
    if own.queries != other.queries:
        return stages
    both = replace(
        other,
        sources=own.sources + other.sources,
        visible=own.visible + other.visible,
        begun=first_heads,
        first=own.first,
    )
    first = replace(stages[0], passes=(replace(own, heads=range(first_heads)),))
    return first, replace(stages[1], passes=(both,)), *stages[2:]


def fuse_passes(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Forward: every two passes of a stage over the same queries become one pass over two sources."""
    return tuple(replace(stage, passes=_paired(stage.passes)) for stage in stages)


def skip_rows(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Forward: a pass works only on the rows that see one of its keys. See `distflash.liveness`."""
    passes = [each for stage in stages for each in stage.passes]
    # Heads may attend to the same keys in different passes, which then share the intervals.
    intervals = {id(rows): rows for each in passes for rows in each.visible}
    if len(intervals) < 2:
        return tuple(stages)
    numbers = {name: n for n, name in enumerate(intervals)}
    seen = torch.stack([groups_that_see(rows.row_lo, rows.row_hi) for rows in intervals.values()])

    def changed(each: Pass) -> Pass:
        of_pass = [numbers[id(rows)] for rows in each.visible]
        begun, rows = each.begun > 0, each.visible[0].row_lo
        live = live_rows(seen, range(of_pass[0], of_pass[-1] + 1), begun, len(rows))
        flags = torch.full(seen.shape[1:], all_rows(each.first, each.last, begun))
        return each if torch.equal(live.groups[:, 1], flags.int()) else replace(each, live=live.to(rows.device))

    return tuple(replace(stage, passes=tuple(map(changed, stage.passes))) for stage in stages)


def defer_heads_to_the_end(stages: Sequence[Stage], rank: int, first_heads: int, kv_heads: int) -> tuple[Stage, ...]:
    """Backward: all but the first ``first_heads`` key heads process the local keys last, overlapping the dK/dV sends.

    This pass overwrites dK and dV of the local keys. So stages are returned unchanged if other ranks' gradients are
    added to them before.
    """
    stages = tuple(stages)
    passes = [each for stage in stages for each in stage.passes]
    if len(passes) < 2 or any(each.queries != rank for each in passes):
        return stages
    if not _alone(stages[0], rank) or stages[-1].passes or _added_before_the_end(stages):
        return stages
    (own,) = stages[0].passes
    first = replace(stages[0], passes=(replace(own, heads=range(first_heads)),))
    rest = replace(own, heads=range(first_heads, kv_heads), first=False, last=True)
    middle = [replace(s, passes=tuple(replace(each, last=False) for each in s.passes)) for s in stages[1:-1]]
    return first, *middle, replace(stages[-1], passes=(rest,))


def defer_dq(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Backward: the last pass is split, so that computing its dQ overlaps the last dK/dV sends."""
    return _last_in_two(stages, Gradients.OF_KEYS, Gradients.OF_QUERIES)


def defer_dkv(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Backward: the last pass is split, so that computing its dK and dV overlaps the last dQ sends."""
    return _last_in_two(stages, Gradients.OF_QUERIES, Gradients.OF_KEYS)


def with_turns(stages: Sequence[Stage], keys: int, queries: int) -> tuple[Stage, ...]:
    """Backward: each pass has the order in which blocks of its keys add to tiles of dQ. See `distflash.turns`."""

    def changed(each: Pass) -> Pass:
        (rows,) = each.visible
        return replace(each, turns=turns_of(rows, keys, queries))

    return tuple(replace(stage, passes=tuple(map(changed, stage.passes))) for stage in stages)


def _last_in_two(stages: Sequence[Stage], first: Gradients, second: Gradients) -> tuple[Stage, ...]:
    stages = tuple(stages)
    if len(stages) < 2 or stages[-1].passes or not stages[-2].passes:
        return stages
    *before, last = stages[-2].passes
    one, other = (replace(last, gradients=which) for which in (first, second))
    return *stages[:-2], replace(stages[-2], passes=(*before, one)), replace(stages[-1], passes=(other,))


def _alone(stage: Stage, source: int | None = None) -> bool:
    """Whether a stage has exactly one pass and it has one source: ``source``, if given."""
    if len(stage.passes) != 1 or len(stage.passes[0].sources) != 1:
        return False
    return source is None or stage.passes[0].sources == (source,)


def _added_before_the_end(stages: Sequence[Stage]) -> bool:
    """Whether dK and dV from other ranks arrive before the last stage begins."""
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
