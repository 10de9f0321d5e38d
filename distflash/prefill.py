"""Chunked prefill: append a chunk's keys to the cache, and attend to all keys in it.

[Note: shapes] B sequences, T local tokens of the chunk, H query heads, G key/value heads, D head dim of q and k, V of
v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash import engine, lengths
from distflash.cache import Cache, mask_of
from distflash.chunks import Chunk
from distflash.context import ContextParallel
from distflash.engine import Call
from distflash.exact import ByIdentity
from distflash.given import Options
from distflash.host_to_device import to_device
from distflash.kernels import Kernel, Problem
from distflash.kernels.base import Scores
from distflash.ledger import Ledger, Move
from distflash.mask_algebra import Mask
from distflash.plan import Plan
from distflash.transport import Message, during, preparing
from distflash.validation import came

CHUNK = "attention over a cache"


@dataclass(frozen=True)
class Forward:
    """The arguments of a chunk's forward, besides q, k and v.

    Attributes:
        cp: the group of the call.
        cache: the keys before the chunk.
        mask: of the whole sequence.
        tokens: the number of tokens of the chunk, over all ranks.
        options: see `attention`.
        sinks, alibi_slopes: ``[H]`` or None.
    """

    cp: ContextParallel
    cache: Cache
    mask: Mask
    tokens: int
    options: Options
    sinks: Tensor | None
    alibi_slopes: Tensor | None


@torch.compiler.disable
def prefill(q: Tensor, k: Tensor, v: Tensor, forward: Forward) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of `attention` over a cache. q: ``[B, T, H, D]``, k: ``[B, T, G, D]``, v: ``[B, T, G, V]``.

    Raises:
        ValueError: on every rank; the cache stays unchanged.
    """
    cache = forward.cache
    if (problem := _problem(q, k, v, forward)) is not None:
        cache.refuse(problem)
    q, k, v = (x.resolve_neg() for x in (q, k, v))  # kernels read what is in memory
    asked = _asked(q, k, v, forward)
    calls = forward.cp.calls
    kernel = calls.kernel_for(asked)
    if isinstance(kernel, str):
        cache.refuse(kernel)
    _agree(q, kernel, asked, forward)
    with preparing(forward.cp.transport):
        before, after = _ledgers(forward)
        plans = [
            calls.chunk_plan(
                Chunk(calls.by_value(ByIdentity(mask_of(forward.mask, n))), *pair, forward.cp.layout, asked), kernel
            )
            for n, pair in enumerate(zip(before, after, strict=True))
        ]
    cache.shrink(before)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False), during(forward.cp.transport, "forward", q):
        results = [
            _one(n, q[n : n + 1], (k[n : n + 1], v[n : n + 1]), ledger, plan, kernel, forward)
            for n, (ledger, plan) in enumerate(zip(after, plans, strict=True))
        ]
    cache.record(after)
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def _one(
    n: int, q: Tensor, kv: tuple[Tensor, Tensor], ledger: Ledger, plan: Plan, kernel: Kernel, forward: Forward
) -> tuple[Tensor, Tensor]:
    """Attention of sequence ``n``. Sequences are computed one by one, so that their keys are contiguous for sends."""
    store, options, count = forward.cache.store, forward.options, ledger.counts[forward.cp.rank]
    _keep(n, kv, ledger, forward)
    scores = Scores.of(q.shape[3], options.scale, options.softcap, forward.alibi_slopes, forward.sinks)
    call = Call(plan, forward.cp.transport, kernel, scores)
    out, lse, _ = engine.forward(q, store.k[n : n + 1, :count], store.v[n : n + 1, :count], call)
    return out, lse


def _keep(n: int, kv: tuple[Tensor, Tensor], ledger: Ledger, forward: Forward) -> None:
    """Append the chunk's keys that this rank stores: its own, and those that it receives from others."""
    store, rank = forward.cache.store, forward.cp.rank
    start, count = ledger.total - forward.tokens, ledger.counts[rank]
    old = int(torch.searchsorted(ledger.held[rank], start))
    kept = ledger.held[rank][old:]
    moves = [move for move in ledger.moves if rank in (move.sender, move.receiver)]
    new = _rebalanced(kv, kept, start, moves, forward) if moves else [x[0] for x in kv]
    store.k[n, old:count], store.v[n, old:count] = new
    store.positions[n, old:count] = to_device(kept, store.k.device)


def _rebalanced(
    kv: tuple[Tensor, Tensor], kept: Tensor, start: int, moves: list[Move], forward: Forward
) -> list[Tensor]:
    """Rebalance the chunk's keys over ranks. Returns k and v ``[tokens, G, dim]`` at the positions ``kept``."""
    cp, device = forward.cp, kv[0].device
    brought = (cp.layout.positions(forward.tokens, cp.world_size, cp.rank) + start).int()
    here = [[x[0]] for x in kv]
    positions, sends, receives = [brought], [], []
    for move in moves:
        if move.sender == cp.rank:
            at = to_device(torch.searchsorted(brought, move.positions), device)
            sends += [Message(x[0].index_select(0, at), move.receiver, "keys that another rank keeps") for x in kv]
        else:
            room = [x.new_empty(len(move.positions), *x.shape[2:]) for x in kv]
            receives += [Message(x, move.sender, "keys that this rank keeps") for x in room]
            positions.append(move.positions)
            for pieces, x in zip(here, room, strict=True):
                pieces.append(x)
    cp.transport.exchange(sends, receives).wait()
    every = torch.cat(positions)
    order = every.argsort()
    at = to_device(order[torch.searchsorted(every[order], kept)], device)
    return [torch.cat(pieces).index_select(0, at) for pieces in here]


def _ledgers(forward: Forward) -> tuple[list[Ledger], list[Ledger]]:
    """For each sequence, the ledgers before the chunk (dropped keys left out) and with it."""

    def more(ledger: Ledger) -> Ledger:
        return ledger.with_chunk(forward.cp.layout, forward.tokens)

    before = [
        forward.cache.with_room(ledger, mask_of(forward.mask, n), more, forward.tokens)
        for n, ledger in enumerate(forward.cache.ledgers())
    ]
    return before, list(map(more, before))


def cache_problem(cache: object, self_attention: bool, max_logits: bool = False, dropout_p: float = 0.0) -> str | None:
    """Whether it is a cache, in a call whose queries are the keys' tokens and that asks for what a cache can give."""
    if not isinstance(cache, Cache):
        return f"cache: expected a df.Cache, got {came(cache)}"
    if not self_attention:
        return (
            "cache: with a cache queries are the tokens of the chunk, behind those that it keeps; leave q_start, q_len "
            "and kv_layout out"
        )
    if max_logits:
        return (
            "return_max_logits: expected False with a cache, which serves generation, got True; leave it out, or make "
            "the call without the cache"
        )
    if dropout_p:
        return f"dropout_p: expected 0 with a cache, which is for inference, got {came(dropout_p)}; leave it out"
    return None


def _problem(q: Tensor, k: Tensor, v: Tensor, forward: Forward) -> str | None:
    cp, cache, layout = forward.cp, forward.cache, forward.cp.layout
    problem = lengths.seq_len_problem(forward.tokens) or cache.problem(q, k, v, forward.sinks, cp)
    problem = problem or lengths.rows_problem(forward.mask, cache.batch, 1)
    if problem is not None:
        return problem
    expected = layout.length(forward.tokens, cp.world_size, cp.rank)
    if q.shape[1] != expected:
        return (
            f"q: {q.shape[1]} local tokens, but {layout!r} gives rank {cp.rank} of {cp.world_size} {expected} of "
            f"seq_len={forward.tokens}; with a cache seq_len is the number of the chunk's tokens, which are sharded by "
            "themselves, with cp.shard(chunk)"
        )
    if max(cache.lengths) + forward.tokens > lengths.MAX_SEQ_LEN:
        return f"seq_len: {forward.tokens} tokens after {cache.length}; expected positions below {lengths.MAX_SEQ_LEN}"
    return None


def _asked(q: Tensor, k: Tensor, v: Tensor, forward: Forward) -> Problem:
    alibi, sinks = forward.alibi_slopes is not None, forward.sinks is not None
    sizes = (q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return Problem(q.device, q.dtype, *sizes, forward.options.softcap, alibi, sinks, forward.options.dropout_p)


def _agree(q: Tensor, kernel: Kernel, asked: Problem, forward: Forward) -> None:
    """Compare the call over the ranks. Lengths grow from call to call, so they are not in the signature."""
    options, cp = forward.options, forward.cp
    key = (asked, q.shape[0], cp.calls.by_value(ByIdentity(forward.mask)), options)
    cp.agreement.require(
        CHUNK,
        lambda: {
            "batch": q.shape[0],
            "tokens of the chunk (seq_len)": forward.tokens,
            "tokens in the cache (cache.lengths)": forward.cache.lengths,
            "capacity": forward.cache.capacity,
            "heads": asked.heads,
            "kv_heads": asked.kv_heads,
            "head_dim": asked.d_qk,
            "value head_dim": asked.d_v,
            "dtype": asked.dtype,
            "mask": forward.mask,
            "scale": options.scale,
            "softcap": options.softcap,
            "sinks": asked.sinks,
            "alibi_slopes": asked.alibi,
            "layout": cp.layout,
            "schedule": cp.schedule,
            "kernel": kernel,
        },
        key=key,
    )
