"""The plan of a chunk of a sequence, whose queries see keys that are kept from earlier chunks and those of their own.

[Note: later] A mask is asked about positions far beyond the sequence to find what later queries see. A mask that does
not know its length is told the largest there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from distflash.exact import Exact
from distflash.geometry import Geometry, Sharded
from distflash.kernels import Kernel, Problem
from distflash.layouts import Layout
from distflash.ledger import Ledger
from distflash.lengths import MAX_SEQ_LEN
from distflash.masks import Ends, Mask
from distflash.overlap import overlap
from distflash.plan import Plan
from distflash.schedules import PassQuery, Ring, Schedule
from distflash.schedules.travel import KeysTravel


@dataclass(frozen=True)
class Chunk:
    """A chunk of one sequence.

    Attributes:
        mask: of the whole sequence.
        before, after: which rank keeps which keys, without the chunk's and with them.
        layout: how the chunk's tokens are spread.
        problem: what the call asks of a kernel.
    """

    mask: Exact
    before: Ledger
    after: Ledger
    layout: Layout = field(compare=False)  # which ``after`` follows from
    problem: Problem

    @cached_property
    def ends(self) -> tuple[Ends, ...]:
        """What the chunk's queries see, by ascending position, not knowing how many tokens there are; see
        [Note: later].
        """
        return self.mask.value.parts(torch.arange(self.before.total, self.after.total), told(self.mask.value))

    @cached_property
    def geometry(self) -> Geometry:
        """The chunk's queries over all keys that are kept."""
        start, stop = self.before.total, self.after.total
        queries = Sharded(self.layout, stop - start, self.after.world_size, start)
        mask = _Found(self.mask.value, start, self.ends)
        return Geometry(mask, queries, self.after, stop, for_backward=False, distances=self.problem.alibi)

    def refusal(self) -> str | None:
        """Why keys that the mask allows are not there, in words; None if all are."""
        mask, stop = self.mask.value, self.after.total
        if (problem := length_problem(mask, stop)) is not None:
            return problem
        if any(bool(((hi > lo) & (hi > stop)).any()) for lo, hi in self.ends):
            return (
                f"mask: {mask!r} lets tokens {self.before.total} to {stop - 1} see keys that come after this chunk; "
                "with a cache a token sees what is there: pass mask=df.Causal(), or this mask & df.Causal(), or a "
                "first chunk as long as the prefix that is seen both ways"
            )
        allowed = sum(int((hi - lo.clamp_min(0)).clamp_min(0).sum()) for lo, hi in self.ends)
        return None if int(self.geometry.needs.pairs.sum()) == allowed else dropped_problem(mask, self.before)

    def plan(self, schedule: Schedule, kernel: Kernel, rank: int, near: bool) -> Plan:
        """By keys or queries that travel, whichever is less: see `lighter`."""
        plan = self.lighter(schedule).plan(self.geometry, rank)
        plan = replace(plan, backward=())
        device = self.problem.device
        return overlap(plan, self.problem.kv_heads, 1, kernel.abilities(device), near).to(device)

    def lighter(self, schedule: Schedule) -> Schedule:
        """`PassQuery`, or the schedule by which keys travel, ``schedule`` if it is one: the one that sends fewer bytes,
        counted over all ranks.
        """
        if isinstance(schedule, PassQuery):
            return schedule
        keys, queries, problem = *_moved(self.geometry), self.problem
        short, wide = problem.dtype.itemsize, max(4, problem.dtype.itemsize)
        by_keys = keys * problem.kv_heads * (problem.d_qk + problem.d_v) * short
        by_queries = queries * problem.heads * (problem.d_qk * short + (problem.d_v + 2) * wide)
        travels = schedule if isinstance(schedule, KeysTravel) else Ring()
        return PassQuery() if by_queries < by_keys else travels


@dataclass(frozen=True)
class _Found(Mask):
    """A mask whose ends at the positions from ``start`` on have been found, once for the queries of all ranks."""

    mask: Mask
    start: int
    found: tuple[Ends, ...]

    def __repr__(self) -> str:
        return repr(self.mask)

    def parts(self, positions: torch.Tensor, seq_len: int) -> tuple[Ends, ...]:
        at = positions - self.start
        return tuple((lo[at], hi[at]) for lo, hi in self.found)


def _moved(geometry: Geometry) -> tuple[int, int]:
    """How many keys go to another rank, and how many queries would in their place."""
    ranks, rows = range(geometry.world_size), geometry.needs.rows
    others = [(rank, source) for rank in ranks for source in ranks if rank != source and rows[rank][source]]
    keys = sum(len(run) for rank, source in others for run in rows[rank][source])
    return keys, sum(geometry.queries.length(rank) for rank, _ in others)


def told(mask: Mask) -> int:
    """The length that a mask is told where it is asked about positions to come; see [Note: later]."""
    return MAX_SEQ_LEN if mask.seq_len is None else mask.seq_len


def length_problem(mask: Mask, total: int) -> str | None:
    """Whether a mask that knows its length is about so many tokens."""
    if total <= told(mask):
        return None
    return (
        f"mask: {mask!r} is for a sequence of {told(mask)} tokens, but with this call the cache has had {total}; "
        "make a mask of the whole sequence, tokens to come included"
    )


def dropped_problem(mask: Mask, ledger: Ledger) -> str:
    """In words, that keys which the mask allows have been dropped."""
    return (
        f"mask: {mask!r} lets tokens see keys that the cache keeps no longer: of the {ledger.total} tokens so far it "
        f"keeps {sum(ledger.counts)}, those that the masks of earlier calls let later tokens see. Use one mask for all "
        "calls of a cache, or a capacity that holds the whole sequence"
    )


def seen_later(mask: Mask, total: int) -> tuple[range, ...]:
    """The positions below ``total`` that queries from there on may see, as ascending ranges."""
    last = told(mask) - 1
    if total > last:
        return ()
    parts = mask.cover(torch.tensor([total, last]), last + 1)
    spans = sorted((max(0, int(lo[0])), min(total, int(hi[1]))) for lo, hi in parts)
    merged: list[range] = []
    for start, stop in spans:
        if start >= stop:
            continue
        if merged and start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(stop, merged[-1].stop))
        else:
            merged.append(range(start, stop))
    return tuple(merged)
