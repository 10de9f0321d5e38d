"""Pass-Q: queries are sent instead of keys, and partial softmax states are sent back.

In step t, rank r attends to its local keys for the queries of rank ``(r - t) % W``, as in a ring. Meanwhile it receives
the queries of the next step and returns the partial states of the step before to the rank of the queries, which merges
them (https://arxiv.org/abs/2411.01783). In backward, queries are sent with out, lse and their gradients, dQ is returned
in float32, and dK and dV are added on the rank of the keys. States and dQ are merged in the order of the steps, so
results have the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from distflash.geometry import Geometry, Needs
from distflash.plan import Pass, Plan, Stage, What
from distflash.schedules.base import Schedule, passes_over
from distflash.schedules.moves import Move, in_order, transfers


@dataclass(frozen=True)
class PassQuery(Schedule):
    """For few queries over many keys: a chunk of a prompt over a cache, decoding, cross-attention.

    A rank sends all of its queries to each rank that has a key that one of them sees.

    For T queries that see all K keys of another rank, forward sends ``T H D`` elements there and ``T H (V + 2)``
    float32 numbers back (H query heads, D and V head dims), where `Ring` sends ``K G (D + V)`` elements (G key heads).
    In 16 bits and with D = V this is less if ``T / K`` is below about ``2 G / (3 H)``: two thirds without grouped
    heads, one sixth with four query heads for each key head. `Plan.bytes` counts exactly, for any mask::

        plans = [schedule.plan(geometry, rank) for schedule in (df.Ring(), df.PassQuery())]
        ring, queries = (plan.bytes(heads, kv_heads, d_qk, d_v, torch.bfloat16) for plan in plans)

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, schedule=df.PassQuery())
        >>> q = torch.randn(1, 2, 4, 32)  # of 4 queries, the last of 64 tokens
        >>> k, v = torch.randn(2, 1, 32, 2, 32)
        >>> df.attention(q, k, v, mask=df.Causal(), cp=cp, seq_len=64, q_start=60, q_len=4).shape
        torch.Size([1, 2, 4, 32])
    """

    def plan(self, geometry: Geometry, rank: int) -> Plan:
        needs = geometry.needs
        steps = _steps(needs)
        forward, backward = ([*_moves(geometry, steps, returned)] for returned in (What.PARTIALS, What.QUERY_GRADIENTS))
        work = _work(geometry, rank, steps[rank])
        if forward:
            work.append(())  # the last states return
        away = {move.of for move in forward if rank in (move.sender, move.receiver)}
        return Plan(
            rank=rank,
            forward=_unfinished(_stages(forward, rank, work), away),
            backward=_stages(backward, rank, work),
            lengths=tuple(geometry.keys.length(r) for r in range(geometry.world_size)),
            rows={},
            pairs=needs.pairs,
            remote=needs.remote,
        )


def _steps(needs: Needs) -> list[list[int | None]]:
    """By ranks and steps, whose queries each rank computes, without the steps in which no rank computes."""
    ranks = range(len(needs.rows))
    steps = [[(rank - n) % len(ranks) for n in ranks] for rank in ranks]
    works = [[queries if needs.any_pair(queries, rank) else None for queries in steps[rank]] for rank in ranks]
    made = [n for n in ranks if n == 0 or any(works[rank][n] is not None for rank in ranks)]
    return [[works[rank][n] for n in made] for rank in ranks]


def _moves(geometry: Geometry, steps: Sequence[Sequence[int | None]], returned: What) -> Iterator[Move]:
    """Queries are received in the step before they are computed; results are returned in the step after."""
    lengths = [geometry.queries.length(rank) for rank in range(len(steps))]
    for step in range(1, len(steps[0])):
        for rank, of_rank in enumerate(steps):
            queries = of_rank[step]
            if queries is not None:
                count = lengths[queries]
                yield Move(What.QUERIES, step - 1, step, queries, rank, queries, count)
                yield Move(returned, step + 1, step + 2, rank, queries, queries, count)


def _work(geometry: Geometry, rank: int, steps: Sequence[int | None]) -> list[tuple[Pass, ...]]:
    """The passes of each step over the local keys. The first overwrites dK and dV, the others add to them."""
    work = [() if queries is None else passes_over(geometry, queries, rank) for queries in steps]
    first = next((passes[0] for passes in work if passes), None)
    return [tuple(replace(each, adds=each is not first) for each in passes) for passes in work]


def _stages(moves: Sequence[Move], rank: int, work: Sequence[tuple[Pass, ...]]) -> tuple[Stage, ...]:
    return in_order([Stage(transfers(moves, rank, n), passes) for n, passes in enumerate(work)])


def _unfinished(stages: Sequence[Stage], away: set[int]) -> tuple[Stage, ...]:
    """The stages, without a last pass for these ranks' queries, whose states are merged after the passes."""
    return tuple(
        replace(s, passes=tuple(replace(each, last=each.last and each.queries not in away) for each in s.passes))
        for s in stages
    )
