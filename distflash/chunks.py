"""The plan of a chunk (chunked prefill), whose queries see cached keys of earlier chunks and the chunk's own keys.

[Note: later] To find what later queries see, a mask is evaluated at positions after the sequence's current end. A mask
that does not know its length gets the largest possible one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from distflash.exact import ByValue
from distflash.geometry import Geometry, Sharded
from distflash.kernels import Kernel, Problem
from distflash.layouts import Layout
from distflash.ledger import Ledger
from distflash.lengths import MAX_SEQ_LEN
from distflash.mask_algebra import Ends, Mask
from distflash.overlap import overlap
from distflash.plan import Plan
from distflash.schedules import PassQuery, Ring, Schedule
from distflash.schedules.travel import KeysTravel


@dataclass(frozen=True)
class Chunk:
    """A chunk of one sequence.

    Attributes:
        mask: of the whole sequence.
        before, after: the ledgers without and with the chunk's keys.
        layout: the layout of the chunk's tokens.
        problem: the kernel's part of the specification.
    """

    mask: ByValue
    before: Ledger
    after: Ledger
    layout: Layout = field(compare=False)  # which ``after`` follows from
    problem: Problem

    @cached_property
    def ends(self) -> tuple[Ends, ...]:
        """The mask bounds of the chunk's queries, for a sequence of any length; see [Note: later]."""
        return self.mask.value.parts(torch.arange(self.before.total, self.after.total), length_for(self.mask.value))

    @cached_property
    def geometry(self) -> Geometry:
        """The chunk's queries over all cached keys."""
        start, stop = self.before.total, self.after.total
        queries = Sharded(self.layout, stop - start, self.after.world_size, start)
        mask = _Found(self.mask.value, start, self.ends)
        return Geometry(mask, queries, self.after, stop, for_backward=False, distances=self.problem.alibi)

    def refusal(self) -> str | None:
        """Check that all keys that the mask allows are in the cache. Returns the error message or None."""
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

    def plan(self, schedule: Schedule, kernel: Kernel, rank: int, intra_node: bool) -> Plan:
        """The plan of the schedule that sends less: see `lighter`."""
        plan = self.lighter(schedule).plan(self.geometry, rank)
        plan = replace(plan, backward=())
        device = self.problem.device
        return overlap(plan, self.problem.kv_heads, 1, kernel.abilities(device), intra_node).to(device)

    def lighter(self, schedule: Schedule) -> Schedule:
        """`PassQuery` or a schedule that sends keys (``schedule``, if it does), whichever sends fewer bytes."""
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
    """A mask whose bounds at the positions from ``start`` on were computed once, for the queries of all ranks."""

    mask: Mask
    start: int
    found: tuple[Ends, ...]

    def __repr__(self) -> str:
        return repr(self.mask)

    def parts(self, positions: torch.Tensor, seq_len: int) -> tuple[Ends, ...]:
        at = positions - self.start
        return tuple((lo[at], hi[at]) for lo, hi in self.found)


def _moved(geometry: Geometry) -> tuple[int, int]:
    """How many keys a ring would send, and how many queries pass-Q would send."""
    ranks, rows = range(geometry.world_size), geometry.needs.rows
    others = [(rank, source) for rank in ranks for source in ranks if rank != source and rows[rank][source]]
    keys = sum(len(run) for rank, source in others for run in rows[rank][source])
    return keys, sum(geometry.queries.length(rank) for rank, _ in others)


def length_for(mask: Mask) -> int:
    """The length passed to a mask for future positions; see [Note: later]."""
    return MAX_SEQ_LEN if mask.seq_len is None else mask.seq_len


def length_problem(mask: Mask, total: int) -> str | None:
    """Check that ``total`` tokens are not more than the mask's own length."""
    if total <= length_for(mask):
        return None
    return (
        f"mask: {mask!r} is for a sequence of {length_for(mask)} tokens, but with this call the cache has had {total}; "
        "make a mask of the whole sequence, tokens to come included"
    )


def dropped_problem(mask: Mask, ledger: Ledger) -> str:
    """The error message if keys that the mask allows have been dropped."""
    return (
        f"mask: {mask!r} lets tokens see keys that the cache keeps no longer: of the {ledger.total} tokens so far it "
        f"keeps {sum(ledger.counts)}, those that the masks of earlier calls let later tokens see. Use one mask for all "
        "calls of a cache, or a capacity that holds the whole sequence"
    )


def seen_later(mask: Mask, total: int) -> tuple[range, ...]:
    """The positions below ``total`` that queries from there on may see, as ascending ranges."""
    last = length_for(mask) - 1
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
