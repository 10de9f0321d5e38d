"""Sequences that grow through a cache: a script of chunks, steps and what else happens, on ranks and by the definition.

[Note: shapes] B sequences, L tokens that a sequence has had, n new ones; otherwise as in `tests.dense`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import distflash as df
from distflash.cache import mask_of
from distflash.kernels.base import Scores
from distflash.layouts import Layout
from tests import oracle
from tests.dense import Problem, join

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """A chunk of tokens, sharded: of all sequences, or of one, through ``cache[row]``."""

    tokens: int
    row: int | None = None


@dataclass(frozen=True)
class Step:
    """A few tokens, the same on all ranks: of all sequences, or of one."""

    tokens: int
    row: int | None = None


@dataclass(frozen=True)
class Truncate:
    """``cache.truncate(lengths)``."""

    lengths: int | tuple[int, ...]


@dataclass(frozen=True)
class Reorder:
    """``cache.reorder(indices)``."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class MakeRoom:
    """``cache.make_room(mask)``."""


Action = Chunk | Step | Truncate | Reorder | MakeRoom


@dataclass(frozen=True)
class Script:
    """A sequence of actions on a cache.

    Attributes:
        problem: mask, shapes and numbers of the calls. ``seq_len`` is the largest length of a sequence.
        actions: in order.
        capacity: of the cache.
    """

    problem: Problem
    actions: tuple[Action, ...]
    capacity: int


@dataclass(frozen=True)
class New:
    """New tokens of some sequences: q, k, v ``[rows, n, heads, dim]``."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Told:
    """The inputs of a script, the same on every rank: tokens, sinks and slopes."""

    news: tuple[New | None, ...]
    sinks: Tensor | None
    slopes: Tensor | None


@dataclass
class History:
    """All keys and values of a sequence: ``[1, L, G, dim]``."""

    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.k.shape[1]

    def first(self, length: int) -> History:
        return History(self.k[:, :length], self.v[:, :length])


@dataclass(frozen=True)
class Lopsided(df.Layout):
    """An uneven user layout: of each half, rank 0 has nothing, and later ranks have more."""

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        if world_size == 1:
            return (range(seq_len),)
        half, pairs = seq_len // 2, world_size * (world_size - 1)
        starts, lengths = (0, half), (half, seq_len - half)
        first, last = rank * (rank - 1), (rank + 1) * rank
        shares = zip(starts, lengths, strict=True)
        return tuple(range(s + first * n // pairs, s + last * n // pairs) for s, n in shares)


def told(script: Script) -> Told:
    p, generator = script.problem, torch.Generator().manual_seed(script.problem.seed)

    def normal(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def new(action: Action) -> New | None:
        if not isinstance(action, Chunk | Step):
            return None
        rows, n = p.batch if action.row is None else 1, action.tokens
        heads = ((p.heads, p.d_qk), (p.kv_heads, p.d_qk), (p.kv_heads, p.d_v))
        return New(*(normal(rows, n, *shape) for shape in heads))

    return Told(
        news=tuple(map(new, script.actions)),
        sinks=normal(p.heads, dtype=torch.promote_types(p.dtype, torch.float32)) if p.sinks else None,
        slopes=2.0 ** -torch.arange(1, p.heads + 1) if p.alibi else None,
    )


def by_definition(script: Script, x: Told, compute: torch.dtype, stored: torch.dtype | None = None) -> list[Results]:
    """Dense attention of every new token over its whole sequence: of each action that has tokens, out and lse.

    Args:
        compute, stored: see `oracle.dense`.
    """
    p = script.problem
    nothing = History(*(torch.empty(1, 0, p.kv_heads, dim, dtype=p.dtype) for dim in (p.d_qk, p.d_v)))
    sequences, results = [nothing] * p.batch, []
    for action, new in zip(script.actions, x.news, strict=True):
        match action:
            case Truncate(lengths):
                each = [lengths] * p.batch if isinstance(lengths, int) else lengths
                sequences = [s.first(n) for s, n in zip(sequences, each, strict=True)]
            case Reorder(indices):
                sequences = [sequences[n] for n in indices]
        if new is None:
            continue
        rows = range(p.batch) if action.row is None else [action.row]
        parts = []
        for n, row in enumerate(rows):
            own = New(*(t[n : n + 1] for t in (new.q, new.k, new.v)))
            before = sequences[row]
            sequences[row] = History(torch.cat([before.k, own.k], 1), torch.cat([before.v, own.v], 1))
            # ``cache[row]`` is a batch of one, whose mask is its own.
            parts.append(_dense(p, mask_of(p.mask, row), own.q, sequences[row], x, compute, stored))
        results.append({name: torch.cat([part[name] for part in parts]) for name in ("out", "lse")})
    return results


def _dense(
    p: Problem, mask: df.Mask, q: Tensor, s: History, x: Told, compute: torch.dtype, stored: torch.dtype | None
) -> Results:
    """The last tokens of one sequence over all of it."""
    positions, keys = torch.arange(s.length - q.shape[1], s.length), torch.arange(s.length)
    visible = mask.materialize(positions, keys, p.seq_len)
    scale = p.d_qk**-0.5 if p.scale is None else p.scale
    dout = q.new_zeros(*q.shape[:3], p.d_v)
    scores = Scores(scale, p.softcap, x.slopes, x.sinks)
    return oracle.dense(oracle.Inputs(q, s.k, s.v, dout, None, scores, visible, positions), compute, stored)


def on_rank(script: Script, x: Told, cp: df.ContextParallel) -> list[Results]:
    """This rank's results of each action with tokens: its part of a chunk, or all of a step."""
    p = script.problem
    cache = df.Cache(
        cp, batch=p.batch, kv_heads=p.kv_heads, d_qk=p.d_qk, d_v=p.d_v, capacity=script.capacity, dtype=p.dtype
    )
    poison(cache)
    results = []
    for action, new in zip(script.actions, x.news, strict=True):
        match action:
            case Truncate(lengths):
                cache.truncate(lengths)
            case Reorder(indices):
                cache.reorder(indices)
            case MakeRoom():
                cache.make_room(p.mask)
        if new is not None:
            results.append(_called(script, action, new, x, cache))
        check_records(cache)
    return results


def _called(script: Script, action: Any, new: New, x: Told, cache: df.Cache) -> Results:
    p, cp = script.problem, cache.cp
    mask = p.mask if action.row is None else mask_of(p.mask, action.row)
    cache = cache if action.row is None else cache[action.row]
    numbers = dict(scale=p.scale, softcap=p.softcap, alibi_slopes=x.slopes, sinks=x.sinks, return_lse=True)
    tensors = (new.q, new.k, new.v)
    if isinstance(action, Step):
        out, lse = df.decode(*tensors, cache=cache, mask=mask, **numbers)
    else:
        tensors, tokens = [cp.shard(t) for t in tensors], action.tokens
        out, lse = df.attention(*tensors, mask=mask, cp=cp, cache=cache, seq_len=tokens, **numbers)
    return {"out": out, "lse": lse}


def poison(cache: df.Cache) -> None:
    """Fill memory without tokens with NaN."""
    cache.store.k.fill_(torch.nan)
    cache.store.v.fill_(torch.nan)
    cache.store.positions.fill_(-7)


def check_records(cache: df.Cache) -> None:
    """Check that host and device agree, that each position is stored at most once, and that ranks are balanced."""
    store, rank = cache.store, cache.cp.rank
    assert store.lengths.tolist() == list(cache.lengths)
    for n, ledger in enumerate(cache.ledgers()):
        own = ledger.held[rank]
        assert store.counts[n].tolist() == ledger.counts and ledger.total == cache.lengths[n]
        assert torch.equal(store.positions[n, : len(own)], own), "positions on the device"
        assert len(own) <= store.room
        assert not store.k[n, : len(own)].isnan().any() and not store.v[n, : len(own)].isnan().any(), "unwritten keys"
        every = torch.cat(ledger.held).sort().values
        assert (every.diff() > 0).all() and all((held.diff() > 0).all() for held in ledger.held)


def on_ranks(script: Script, x: Told, world_size: int, layout: Layout, **arguments: Any) -> list[Results]:
    """The script over simulated ranks, put together. Steps have the same bits on all of them."""
    parts = df.transport.Simulator(world_size).run(
        lambda transport: on_rank(script, x, df.ContextParallel(transport, layout, **arguments))
    )
    return joined(script, parts, layout)


def joined(script: Script, parts: Sequence[list[Results]], layout: Layout) -> list[Results]:
    """Whole results of every rank's."""
    return list(_joined(script, parts, layout))


def _joined(script: Script, parts: Sequence[list[Results]], layout: Layout) -> Iterator[Results]:
    calls = [action for action in script.actions if isinstance(action, Chunk | Step)]
    for action, of_ranks in zip(calls, zip(*parts, strict=True), strict=True):
        if isinstance(action, Chunk):
            yield join(of_ranks, layout, action.tokens)
            continue
        for other in of_ranks[1:]:
            assert all(_same_bits(other[name], of_ranks[0][name]) for name in other), f"{action}: ranks differ"
        yield of_ranks[0]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b)))


def assert_exact(script: Script, x: Told, got: Sequence[Results]) -> None:
    """Assert equality with dense attention over the whole sequence in float64, up to rounding."""
    for n, (mine, truth) in enumerate(zip(got, by_definition(script, x, torch.float64), strict=True)):
        for name, value in mine.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(
                value, truth[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name, n=n: f"{name} of call {n}: {m}"
            )


def assert_as_exact(script: Script, x: Told, got: Sequence[Results]) -> None:
    """In lower precision: assert that all calls together are as exact as dense attention with the same roundings."""
    p = script.problem
    truth, plain = by_definition(script, x, torch.float64), by_definition(script, x, torch.float32, p.dtype)
    for name in ("out", "lse"):
        flat = [torch.cat([of_call[name].double().flatten() for of_call in each]) for each in (got, plain, truth)]
        unseen = flat[2] == -torch.inf
        assert torch.equal(flat[0] == -torch.inf, unseen), "which rows see nothing"
        dtype = p.dtype if name == "out" else torch.float32
        assert {of_call[name].dtype for of_call in got} == {dtype}
        mine = flat[0].to(dtype)  # exact: it was of this dtype
        if unseen.all():
            continue
        oracle.assert_as_exact(name, mine[~unseen], flat[1][~unseen], flat[2][~unseen], dtype)


def with_dtype(script: Script, dtype: torch.dtype) -> Script:
    return replace(script, problem=replace(script.problem, dtype=dtype))
