"""A plan is data: what one rank computes and what it sends and receives in a call, known before any tensor.

A schedule makes plans (`schedules`), `overlap` rewrites them to hide transfers, and the engine executes them.
``print(plan)`` is a table.

[Note: stages] A transfer starts with its stage and runs while the stage's passes compute, and perhaps through later
stages. From stage `Transfer.until` on, the received tensors can be read and the sent ones overwritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor

from distflash.intervals import Intervals
from distflash.liveness import LiveRows
from distflash.turns import Turns


class What(Enum):
    """What a transfer moves. One transfer carries all tensors of its kind (k and v, for example) for its tokens."""

    KEYS = "keys"  # k and v
    KEY_GRADIENTS = "dK, dV"  # float32, added up where the keys are
    QUERIES = "queries"  # q; backward also out, lse and their gradients
    QUERY_GRADIENTS = "dQ"  # float32, added up where the queries are
    PARTIALS = "partial states"  # of the softmax, merged where the queries are

    # Faster than Enum's own, which is written in Python.
    __hash__ = object.__hash__


# The dictionary key of local and received tensors: their kind, and the source rank of their tokens.
TensorKey = tuple[What, int]


@dataclass(frozen=True)
class Transfer:
    """Tensors that this rank sends to another rank, or receives from it. There is one message for each tensor.

    Attributes:
        sends: whether this rank sends it; otherwise it receives it.
        what: the kind of tensors.
        of: the rank whose keys or queries they belong to.
        peer: the other rank.
        count: the number of tokens.
        until: the first stage that may read the received tensor or overwrite the sent one. The engine waits before it.
        rows: for a send, which rows of this rank's tensors; for received gradients, the rows that they are added to.
            Ascending ranges; None for all rows.
    """

    sends: bool
    what: What
    of: int
    peer: int
    count: int
    until: int
    rows: tuple[range, ...] | None = None

    def __str__(self) -> str:
        towards = f"to {self.peer}" if self.sends else f"from {self.peer}"
        return f"{self.what.value} of {self.of} ({self.count}) {towards}"


class Gradients(Enum):
    """What one kernel call (`Pass`) of the backward computes."""

    ALL = "dQ, dK, dV"
    OF_KEYS = "dK, dV"
    OF_QUERIES = "dQ"

    __hash__ = object.__hash__  # faster, as in `What`; every kernel launch hashes it (`Pass.facts`)


@dataclass(frozen=True, eq=False)
class Pass:
    """One kernel call: queries of one rank over the keys of one source, or of two sources in order.

    Attributes:
        queries: the rank of the queries.
        sources: the ranks of the keys.
        visible: for each source, the range of its keys that the pass reads (`Intervals.keys`), and which of these each
            query sees.
        heads: the key heads; None for all.
        begun: how many key heads, from head 0 on, are done with the first of two sources: their query heads attended to
            it in an earlier pass, while the keys of the second were arriving (see `overlap.defer_heads`). In this pass
            they attend to the second source only, all other heads to both. 0 with one source.
        first: whether this is the first pass of these queries and heads. If so, the online-softmax state is initialised
            (from the sinks, if any) instead of loaded. Begun heads load theirs in any case.
        last: whether this is their last pass, which divides and rounds the result. In backward, ``first`` and ``last``
            are those of the sum of dQ.
        adds: backward: whether `GradientBuffers` adds dK and dV to the source's buffer; otherwise the kernel writes
            that buffer directly.
        gradients: backward: which gradients are computed.
        live: forward: the groups of consecutive queries that this pass processes, each with its own ``first`` and
            ``last`` flag, see `LiveRows`. None: all rows, with the pass's flags. An optimisation only: a kernel may
            process all rows with the pass's flags instead. It must then do so in every pass. A group may start in a
            later pass than the first, and end in an earlier one than the last. So a kernel that took the group's flags
            in one pass and the pass's flags in another could load a state that no pass has written.
        turns: backward: the order in which blocks of keys add to dQ, for kernels that add in a fixed order, see
            `Turns`. None: the kernel adds in any order, or computes the turns itself.
    """

    queries: int
    sources: tuple[int, ...]
    visible: tuple[Intervals, ...]
    heads: range | None = None
    begun: int = 0
    first: bool = True
    last: bool = True
    adds: bool = False
    gradients: Gradients = Gradients.ALL
    live: LiveRows | None = None
    turns: Turns | None = None

    @cached_property
    def pairs(self) -> int:
        """Unmasked (query, key) pairs per head over all sources; heads below ``begun`` have fewer."""
        return sum(rows.pairs for rows in self.visible)

    @cached_property
    def facts(self) -> tuple[object, ...]:
        """This pass's part of the cache key of a kernel launch: all that the launch depends on except tensors."""
        live = None if self.live is None else self.live.count
        return self.heads, self.begun, self.first, self.last, self.gradients, live

    def __str__(self) -> str:
        keys = " + ".join(
            f"keys of {source}{_of_part(rows)}" for source, rows in zip(self.sources, self.visible, strict=True)
        )
        words = [f"{keys}: {self.pairs} pairs"]
        if self.heads is not None:
            words.append(f"key heads {self.heads.start} to {self.heads.stop - 1}")
        if self.begun:
            words.append(f"heads 0 to {self.begun - 1}: the second source only")
        if self.live is not None:
            words.append(f"{self.live.count} rows")
        if self.gradients is not Gradients.ALL:
            words.append(self.gradients.value)
        marks = [name for name, on in (("first", self.first), ("last", self.last), ("adds", self.adds)) if on]
        return ", ".join(words + marks)


def _of_part(visible: Intervals) -> str:
    return f"[{visible.keys.start}:{visible.keys.stop}]"


@dataclass(frozen=True, eq=False)
class Stage:
    """Transfers, and the passes that overlap with them. See [Note: stages]."""

    transfers: tuple[Transfer, ...] = ()
    passes: tuple[Pass, ...] = ()

    @cached_property
    def waits(self) -> tuple[tuple[int, tuple[Transfer, ...], tuple[Transfer, ...]], ...]:
        """The transfers that are waited for together: ``(until, received, sent)``, ascending in until."""
        return tuple(
            (
                until,
                tuple(t for t in self.transfers if t.until == until and not t.sends),
                tuple(t for t in self.transfers if t.until == until and t.sends),
            )
            for until in sorted({t.until for t in self.transfers})
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank does in a call: built once per mask, layout and length.

    Attributes:
        rank: this rank.
        forward, backward: the stages, the same number on every rank.
        lengths: the number of local keys of every rank.
        rows: for every other rank, which rows of its keys this rank receives, as ascending ranges.
        pairs: int64 ``[W, W]``, allowed (query, key) pairs of each rank's queries (row) with each source (column).
        remote: for each rank, how many remote keys its queries see.
    """

    rank: int
    forward: tuple[Stage, ...]
    backward: tuple[Stage, ...]
    lengths: tuple[int, ...]
    rows: Mapping[int, tuple[range, ...]]
    pairs: Tensor
    remote: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        return len(self.lengths)

    @property
    def exchanges(self) -> int:
        """The number of forward stages in which ranks exchange tensors."""
        return len(self.forward) - 1

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The kernel calls of the forward."""
        return tuple(each for stage in self.forward for each in stage.passes)

    @cached_property
    def backward_passes(self) -> tuple[Pass, ...]:
        """The kernel calls of the backward."""
        return tuple(each for stage in self.backward for each in stage.passes)

    @cached_property
    def own_passes(self) -> tuple[Pass, ...]:
        """The forward passes of this rank's queries."""
        return self.passes_of(self.rank)

    @cached_property
    def works_on_own_keys(self) -> bool:
        """Whether a pass of the backward writes dK and dV of this rank's keys."""
        return any(self.rank in each.sources for each in self.backward_passes)

    @cached_property
    def adds_to_own_keys(self) -> bool:
        """Whether dK and dV of this rank's keys are the sum of several parts."""
        own = (each for each in self.backward_passes if self.rank in each.sources)
        return self.arrivals[What.KEY_GRADIENTS] > 0 or any(each.adds for each in own)

    def passes_of(self, queries: int) -> tuple[Pass, ...]:
        """The forward passes of one rank's queries."""
        return tuple(each for each in self.passes if each.queries == queries)

    @cached_property
    def merges(self) -> bool:
        """Whether other ranks compute partial states of this rank's queries, which are merged here."""
        return any(transfer.sends for transfer in self._of_queries)

    @cached_property
    def moves_queries(self) -> bool:
        """Whether this rank sends or receives queries."""
        return bool(self._of_queries)

    @cached_property
    def _of_queries(self) -> tuple[Transfer, ...]:
        return tuple(t for stage in self.forward for t in stage.transfers if t.what is What.QUERIES)

    @cached_property
    def keeps_partials(self) -> bool:
        """Whether the running softmax of this rank's queries is kept between passes."""
        return self.merges or not all(each.first and each.last for each in self.own_passes)

    def keeps_sums(self, queries: int) -> bool:
        """Whether dQ of one rank's queries is kept between passes."""
        return not all(each.first and each.last for each in self.backward_passes if each.queries == queries)

    @cached_property
    def arrivals(self) -> dict[What, int]:
        """How many transfers of each kind this rank receives in backward."""
        counts = Counter(t.what for stage in self.backward for t in stage.transfers if not t.sends)
        return {what: counts[what] for what in What}

    @property
    def sources(self) -> tuple[int, ...]:
        """The sources of this rank's passes, in order."""
        return tuple(dict.fromkeys(source for each in self.passes for source in each.sources))

    def moved(self, what: What, backward: bool = False) -> int:
        """How many tokens this rank receives of a kind."""
        stages = self.backward if backward else self.forward
        return sum(t.count for stage in stages for t in stage.transfers if t.what is what and not t.sends)

    def bytes(self, heads: int, kv_heads: int, d_qk: int, d_v: int, dtype: torch.dtype, backward: bool = False) -> int:
        """How many bytes this rank receives for each sequence of a batch, forward or backward.

        For comparisons of how much schedules send; the docstring of `PassQuery` has one.

        Args:
            heads, kv_heads: of this rank.
            d_qk, d_v: head dims of queries and keys, and of values.
            dtype: of queries, keys and values.
        """
        short, wide = dtype.itemsize, max(4, dtype.itemsize)
        queries = heads * (d_qk * short + (2 * d_v * short + 2 * wide if backward else 0))
        widths = {
            What.KEYS: kv_heads * (d_qk + d_v) * short,
            What.KEY_GRADIENTS: kv_heads * (d_qk + d_v) * wide,
            What.QUERIES: queries,
            What.QUERY_GRADIENTS: heads * d_qk * wide,
            What.PARTIALS: heads * (d_v + 2) * wide,
        }
        return sum(self.moved(what, backward) * width for what, width in widths.items())

    def to(self, device: torch.device) -> Plan:
        """The same plan with all intervals on ``device``, copied once where passes share them."""
        moved: dict[int, Intervals] = {}

        def on_device(rows: Intervals) -> Intervals:
            if id(rows) not in moved:
                moved[id(rows)] = rows.to(device)
            return moved[id(rows)]

        def moved_pass(each: Pass) -> tuple[Pass]:
            live, turns = each.live and each.live.to(device), each.turns and each.turns.to(device)
            return (replace(each, visible=tuple(map(on_device, each.visible)), live=live, turns=turns),)

        return self.with_passes(moved_pass)

    def with_passes(self, change: Callable[[Pass], Sequence[Pass]]) -> Plan:
        """The same plan with every pass, forward and backward, replaced."""

        def changed(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
            return tuple(
                replace(stage, passes=tuple(new for each in stage.passes for new in change(each))) for stage in stages
            )

        return replace(self, forward=changed(self.forward), backward=changed(self.backward))

    @cached_property
    def done_with(self) -> tuple[tuple[frozenset[TensorKey], ...], tuple[frozenset[TensorKey], ...]]:
        """For each stage, forward and backward, the received keys and queries that no later stage reads or sends."""
        return self._done_with(self.forward), self._done_with(self.backward)

    def _done_with(self, stages: tuple[Stage, ...]) -> tuple[frozenset[TensorKey], ...]:
        last: dict[TensorKey, int] = {}
        for number, stage in enumerate(stages):
            for each in stage.passes:
                last |= dict.fromkeys(((What.KEYS, source) for source in each.sources), number)
                last[What.QUERIES, each.queries] = number
            for transfer in stage.transfers:
                if transfer.what in (What.KEYS, What.QUERIES):
                    name = transfer.what, transfer.of
                    last[name] = max(last.get(name, 0), transfer.until - 1)
        others = {name: number for name, number in last.items() if name[1] != self.rank}
        return tuple(frozenset(name for name, n in others.items() if n == number) for number in range(len(stages)))

    def _words(self, each: Pass) -> str:
        return str(each) if each.queries == self.rank else f"queries of {each.queries}, {each}"

    def _shares(self) -> list[str]:
        """Each rank's share of the work, and how many keys it receives."""
        if self.world_size == 1:
            return []
        total = max(1, int(self.pairs.sum()))
        work = ", ".join(f"{100 * pairs / total:.1f}" for pairs in self.pairs.sum(1).tolist())
        lines = [f"percent of all pairs, by rank: {work}"]
        if self.remote:
            remote = ", ".join(map(str, self.remote))
            lines.append(f"remote keys, by rank: {remote} (each: k and v of one token)")
        return lines

    def __str__(self) -> str:
        """A table by stages: a pass and a transfer in each line, side by side."""
        names = ("forward", self.forward), ("backward", self.backward)
        every = [self._words(each) for _, stages in names for stage in stages for each in stage.passes]
        width = max(map(len, [*every, "computes"])) + 2
        lines = [f"Plan of rank {self.rank} of {self.world_size}: {int(self.pairs[self.rank].sum())} allowed pairs"]
        lines += self._shares()
        for name, stages in names:
            lines.append(f"{name:<11}{'computes':<{width}}meanwhile")
            for number, stage in enumerate(stages):
                computes = [self._words(each) for each in stage.passes] or ["-"]
                meanwhile = [f"{'send' if t.sends else 'receive'} {t}" for t in stage.transfers] or ["-"]
                for n, (left, right) in enumerate(zip_longest(computes, meanwhile, fillvalue="")):
                    lines.append(f"  {f'stage {number}' if n == 0 else '':<9}{left:<{width}}{right}".rstrip())
        return "\n".join(lines)
