"""Invariants of the plans of all ranks, checked as data, without tensors or a transport."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distflash import liveness
from distflash.geometry import Geometry
from distflash.plan import Gradients, Pass, Plan, Stage, What


def check(plans: Sequence[Plan], geometry: Geometry, kv_heads: int) -> None:
    """Check all invariants below for the plans of all ranks."""
    for backward in (False, True):
        stages = [plan.backward if backward else plan.forward for plan in plans]
        assert len({len(s) for s in stages}) == 1, "ranks have equally many stages"
        _check_messages(stages)
        _check_buffers(plans, stages)
        _check_returns(plans, stages)
        counted = {name: _pairs(plans, stages, geometry, kv_heads, leaves_out) for name, leaves_out in _WAYS[backward]}
        for name, counts in counted.items():
            _check_pairs(name, counts, geometry)
    for plan in plans:
        _check_first_and_last(plan, kv_heads)
        _check_overwriting(plan, kv_heads)
        if any(each.live for each in plan.passes):
            for head in range(kv_heads):
                _check_live_rows(plan, head)


# Which passes do not count towards what: forward, then backward.
_WAYS = {
    False: (("out", None),),
    True: (("dK and dV", Gradients.OF_QUERIES), ("dQ", Gradients.OF_KEYS)),
}


def _check_messages(stages: Sequence[Sequence[Stage]]) -> None:
    """Sends and receives match one to one, in the same stage and order."""
    between = defaultdict(lambda: ([], []))
    for rank, of_rank in enumerate(stages):
        for number, stage in enumerate(of_rank):
            for t in stage.transfers:
                ends = (rank, t.peer) if t.sends else (t.peer, rank)
                assert rank != t.peer and number < t.until <= len(of_rank)
                between[ends][0 if t.sends else 1].append((number, t.until, t.what, t.of, t.count))
    for (sender, receiver), (sent, received) in between.items():
        assert sent == received, f"from {sender} to {receiver}: {sent} sent, {received} received"


def _check_buffers(plans: Sequence[Plan], stages: Sequence[Sequence[Stage]]) -> None:
    """Nothing is read before it has arrived, or after it has been freed."""
    for plan, of_rank in zip(plans, stages, strict=True):
        done_with = plan.done_with[of_rank is plan.backward]
        at_hand, written = {What.KEYS: {plan.rank}, What.QUERIES: {plan.rank}}, {(What.KEY_GRADIENTS, plan.rank)}
        arriving: list[tuple[int, What, int]] = []
        for number, stage in enumerate(of_rank):
            for until, what, of in arriving:
                if until == number and what in at_hand:
                    at_hand[what].add(of)
            for t in stage.transfers:
                if not t.sends:
                    arriving.append((t.until, t.what, t.of))
                elif t.what in at_hand:
                    assert t.of in at_hand[t.what]
                    name = t.what, t.of
                    assert not any(name in done_with[n] for n in range(number, t.until - 1)), "sent, but given up"
                else:
                    assert (t.what, t.of) in written, f"{t} before it is written"
            for each in stage.passes:
                assert {*each.sources} <= at_hand[What.KEYS] and each.queries in at_hand[What.QUERIES]
                written |= {(What.KEY_GRADIENTS, source) for source in each.sources}
                written |= {(What.QUERY_GRADIENTS, each.queries), (What.PARTIALS, each.queries)}
            for what, of in done_with[number]:
                at_hand[what].remove(of)
        assert all(of == {plan.rank} for of in at_hand.values()), "every buffer is given up"


def _check_returns(plans: Sequence[Plan], stages: Sequence[Sequence[Stage]]) -> None:
    """Results for another rank's queries or keys are sent to that rank once, and not written afterwards."""
    for plan, of_rank in zip(plans, stages, strict=True):
        backward = of_rank is plan.backward
        written: dict[tuple[What, int], int] = {}
        for number, stage in enumerate(of_rank):
            for each in stage.passes:
                if not backward:
                    written[What.PARTIALS, each.queries] = number
                elif each.gradients is not Gradients.OF_KEYS:
                    written[What.QUERY_GRADIENTS, each.queries] = number
                if backward and each.gradients is not Gradients.OF_QUERIES:
                    written |= {(What.KEY_GRADIENTS, source): number for source in each.sources}
        sent = [
            ((t.what, t.of), t.peer, number)
            for number, stage in enumerate(of_rank)
            for t in stage.transfers
            if t.sends and t.what not in (What.KEYS, What.QUERIES)
        ]
        assert sorted(str(name) for name, _, _ in sent) == sorted(str(name) for name in written if name[1] != plan.rank)
        assert all(peer == name[1] and number > written[name] for name, peer, number in sent)


def _pairs(
    plans: Sequence[Plan], stages: Sequence[Sequence[Stage]], geometry: Geometry, kv_heads: int, out: Gradients | None
) -> dict[tuple[int, int], Tensor]:
    """How often each pair of a rank's queries and a source's keys is computed, ``[kv_heads, T, K]``."""
    keys, queries = geometry.keys, geometry.queries
    W = geometry.world_size
    counts = {(r, s): torch.zeros(kv_heads, queries.length(r), keys.length(s)) for r in range(W) for s in range(W)}
    for plan, of_rank in zip(plans, stages, strict=True):
        for each in (each for stage in of_rank for each in stage.passes if out is None or each.gradients is not out):
            for n, (source, rows) in enumerate(zip(each.sources, each.visible, strict=True)):
                at_hand = torch.arange(keys.length(source))
                if source != plan.rank:
                    at_hand = torch.cat([at_hand[r.start : r.stop] for r in plan.rows[source]])
                seen = torch.arange(len(rows.keys))
                seen = (seen >= rows.row_lo[:, None]) & (seen < rows.row_hi[:, None])
                some = at_hand[rows.keys.start : rows.keys.stop]
                heads = each.heads or range(kv_heads)
                start = max(heads.start, each.begun) if n == 0 else heads.start
                counts[each.queries, source][start : heads.stop, :, some] += seen.float()
    return counts


def _check_pairs(name: str, counts: dict[tuple[int, int], Tensor], geometry: Geometry) -> None:
    """Every allowed pair is computed once, and no other."""
    for (rank, source), count in counts.items():
        positions = geometry.queries.positions(rank), geometry.keys.positions(source)
        allowed = geometry.mask.materialize(*positions, geometry.seq_len).float()
        assert torch.equal(count, allowed.expand_as(count)), f"{name}: queries of {rank}, keys of {source}"


def _check_first_and_last(plan: Plan, kv_heads: int) -> None:
    """For each rank's queries and each head, only the first pass has ``first``, and only the last has ``last``."""
    for queries in {each.queries for each in plan.passes}:
        for head in range(kv_heads):
            marks = [_first_of(each, head) for each in plan.passes if each.queries == queries and _is_of(each, head)]
            assert marks == [True] + [False] * (len(marks) - 1)
    ends = {each.queries: [] for each in plan.passes}
    for each in plan.passes:
        ends[each.queries].append(each.last)
    for queries, lasts in ends.items():
        assert not any(lasts[:-1]), "nothing follows the last pass"
        assert lasts[-1] == (queries == plan.rank and not plan.merges), "a partial state that travels goes on"
    back = [each for stage in plan.backward for each in stage.passes if each.gradients is not Gradients.OF_KEYS]
    for queries in {each.queries for each in back}:
        own = [each for each in back if each.queries == queries]
        assert [each.first for each in own] == [True] + [False] * (len(own) - 1)
        assert [each.last for each in own] == [False] * (len(own) - 1) + [True]


def _check_live_rows(plan: Plan, head: int) -> None:
    """Each row group is live in passes in which it sees a key, starts in the first of them, and ends in the last."""
    passes = [each for each in plan.passes if _is_of(each, head)]
    assert all(each.queries == plan.rank for each in passes), "states that travel are of all rows"
    rows = len(passes[0].visible[0].row_lo)
    for start in range(0, rows, liveness.GROUP_ROWS):
        group = slice(start, start + liveness.GROUP_ROWS)
        flags = [_flags(each, head, start) for each in passes]
        seen = [_sees(each, head, group) for each in passes]
        live = [bool(each & liveness.LIVE) for each in flags]
        assert live == seen if any(seen) else sum(live) == 1
        of_live = [each for each in flags if each & liveness.LIVE]
        assert [bool(each & liveness.STARTS) for each in of_live] == [n == 0 for n in range(len(of_live))]
        assert [bool(each & liveness.ENDS) for each in of_live][::-1] == [n == 0 for n in range(len(of_live))]
    for each in passes:
        if each.live:
            starts = each.live.groups[:, 0].tolist()
            assert starts == sorted(starts) and all(start % liveness.GROUP_ROWS == 0 for start in starts)
            assert each.live.count == sum(min(liveness.GROUP_ROWS, rows - start) for start in starts)


def _flags(each: Pass, head: int, start: int) -> int:
    """Of the group that starts with this row."""
    if each.live is None:
        flags = liveness.all_rows(each.first, each.last, each.begun > 0)
    else:
        flags = dict(each.live.groups.tolist()).get(start, 0)
    return flags >> (liveness.BEGUN_BITS if head < each.begun else 0)


def _sees(each: Pass, head: int, group: slice) -> bool:
    visible = each.visible[1:] if head < each.begun else each.visible
    return any(bool((rows.row_hi[group] > rows.row_lo[group]).any()) for rows in visible)


def _is_of(each: Pass, head: int) -> bool:
    return each.heads is None or head in each.heads


def _first_of(each: Pass, head: int) -> bool:
    return each.first and head >= each.begun


def _check_overwriting(plan: Plan, kv_heads: int) -> None:
    """For each source and head, dK and dV are overwritten once, before anything is added."""
    events: dict[tuple[int, int], list[str]] = defaultdict(list)
    arriving: list[tuple[int, int]] = []
    for number, stage in enumerate((*plan.backward, Stage())):
        for until, of in arriving:
            if until == number:
                for head in range(kv_heads):
                    events[of, head].append("add")
        for t in stage.transfers:
            if t.what is What.KEY_GRADIENTS and not t.sends:
                arriving.append((t.until, t.of))
        for each in stage.passes:
            if each.gradients is not Gradients.OF_QUERIES:
                for head in each.heads or range(kv_heads):
                    events[each.sources[0], head].append("add" if each.adds else "write")
    for order in events.values():
        written = [n for n, event in enumerate(order) if event == "write"]
        assert written in ([], [0]), f"{order}"
