"""Decoding: a few new tokens, the same on all ranks, over a sharded cache.

Each rank attends to the keys that it stores. The ranks exchange only the partial softmax states of the new tokens, and
merge them in the same order, so all ranks return the same bits.

[Note: shapes] B sequences, n new tokens of each, H query heads, G key/value heads, D head dim of q and k, V of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from distflash import lengths, validation
from distflash.cache import Cache, mask_of
from distflash.chunks import dropped_problem
from distflash.exact import ByIdentity
from distflash.horizon import Horizon
from distflash.kernels import Kernel, Problem
from distflash.kernels.base import Scores
from distflash.mask_algebra import Mask
from distflash.masks import Causal
from distflash.profiling import named
from distflash.transport import during

STEP = "decode"
# More tokens are a chunk, whose queries should be sharded over the ranks.
MOST_TOKENS = 64


@dataclass(frozen=True)
class DecodeStep:
    """The arguments of a step besides q, k and v; see `decode`."""

    cache: Cache
    mask: Mask
    scale: float | None
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None


class _Keywords(TypedDict, total=False):
    """The keywords of `decode`, except ``cache`` and ``return_lse``, which decides the type of the result."""

    mask: Mask
    scale: float | Tensor | None
    softcap: float | Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None


@overload
def decode(
    q: Tensor, k: Tensor, v: Tensor, *, cache: Cache, return_lse: Literal[False] = False, **keywords: Unpack[_Keywords]
) -> Tensor: ...
@overload
def decode(
    q: Tensor, k: Tensor, v: Tensor, *, cache: Cache, return_lse: Literal[True], **keywords: Unpack[_Keywords]
) -> tuple[Tensor, Tensor]: ...
@overload
def decode(
    q: Tensor, k: Tensor, v: Tensor, *, cache: Cache, return_lse: bool, **keywords: Unpack[_Keywords]
) -> Tensor | tuple[Tensor, Tensor]: ...
@torch.compiler.disable
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache: Cache,
    mask: Mask = Causal(),
    scale: float | Tensor | None = None,
    softcap: float | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new tokens, which every rank has, over the cache and themselves.

    Their keys are appended to the cache, each on the rank that stores the fewest. All ranks return the same bits.
    Sequences may have different lengths. On GPUs there is no synchronisation. After one step outside of it, a step can
    be captured in a CUDA graph and replayed until the cache is full, with new tokens copied into q, k and v.

    Args:
        q: ``[batch, n, heads, d_qk]``, the same values on every rank; n is 1, or a few for drafts.
        k: ``[batch, n, kv_heads, d_qk]``. v: ``[batch, n, kv_heads, d_v]``. In the cache's dtype, on its device.
        cache: the cache that the tokens are appended to.
        mask: over positions of the whole sequence. A token sees at most itself and earlier tokens.
        scale, softcap, alibi_slopes, sinks, return_lse: as in `attention`.

    Returns:
        out ``[batch, n, heads, d_v]``; with ``return_lse`` also lse ``[batch, heads, n]``.

    Raises:
        ValueError: on every rank, without a change of the cache: an argument is wrong, the cache is full, the mask lets
            a token see keys that are not in the cache, or ranks disagree. Ranks with different tokens are found by the
            device: on GPUs the results are then NaN, also in later steps, until a later call raises.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD)
        >>> cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=64, capacity=64, dtype=torch.float32)
        >>> q, k, v = (torch.randn(1, 1, heads, 64) for heads in (8, 2, 2))  # one new token, the same on every rank
        >>> dist.broadcast(q, 0), dist.broadcast(k, 0), dist.broadcast(v, 0)
        (None, None, None)
        >>> df.decode(q, k, v, cache=cache).shape, cache.length
        (torch.Size([1, 1, 8, 64]), 1)
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"cache: expected a df.Cache, got {validation.came(cache)}")
    problem = validation.call_problem(q, k, v, mask, sinks, alibi_slopes, scale, softcap, 0.0, True)
    problem = problem or validation.device_problem(q, cache.cp.transport) or cache.problem(q, k, v, sinks, cache.cp)
    problem = problem or lengths.rows_problem(mask, cache.batch, 1)
    if problem is None and not 1 <= q.shape[1] <= MOST_TOKENS:
        problem = (
            f"q: {q.shape[1]} new tokens; expected 1 to {MOST_TOKENS}, which every rank holds. Shard more of them over "
            "the ranks, and pass them to df.attention(..., cache=cache)"
        )
    if problem is not None:
        cache.refuse(problem)
    number = validation.as_number(softcap) or 0.0
    step = DecodeStep(cache, mask, validation.as_number(scale), number, sinks, alibi_slopes)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        # Kernels read what is in memory.
        out, lse = _attend(q.resolve_neg(), k.resolve_neg(), v.resolve_neg(), step)
    return (out, lse.transpose(1, 2)) if return_lse else out


def _attend(q: Tensor, k: Tensor, v: Tensor, step: DecodeStep) -> tuple[Tensor, Tensor]:
    cache, tokens = step.cache, q.shape[1]
    sizes = (q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    asked = Problem(q.device, q.dtype, *sizes, step.softcap, step.alibi_slopes is not None, step.sinks is not None)
    kernel = cache.cp.calls.kernel_for(asked)
    if isinstance(kernel, str):
        cache.refuse(kernel)
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing:
        cache.raise_fault(late=True)
    _agree(q, asked, kernel, step)
    horizon = _known(step) if capturing else _ready(step, tokens)
    scores = Scores.of(q.shape[3], step.scale, step.softcap, step.alibi_slopes, None)  # sinks are merged in last
    decoding, transport = cache.cp.calls.decoding(kernel, q.device), cache.cp.transport
    if cache.cp.world_size == 1:
        with named("decode"):
            result = decoding.alone(q, k, v, cache.store, horizon.table, scores, step.sinks)
    else:
        with during(transport, "forward", q):
            with named("decode, keys of this rank"):
                message = decoding.attend(q, k, v, cache.store, horizon.table, scores, cache.cp.rank)
            with named("decode, gather of partial states"):
                messages = transport.gather_equal(message)
            with named("decode, merge of partial states"):
                result = decoding.merge(messages, q, cache.store, step.sinks)
    cache.grow(tokens, capturing)
    return result


def _ready(step: DecodeStep, tokens: int) -> Horizon:
    """The mask bounds of the tokens, once they fit into the cache."""
    cache = step.cache
    if cache.length + tokens > lengths.MAX_SEQ_LEN:
        raise ValueError(f"q: {tokens} tokens after {cache.length}; expected positions below {lengths.MAX_SEQ_LEN}")
    horizon = _horizon(step, tokens)
    if (problem := horizon.refusal(cache.lengths, tokens)) is not None:
        raise ValueError(problem)
    if cache.has_dropped():
        _require_kept(step, horizon, tokens)
    if cache.is_full_with(tokens):
        ledgers = [
            cache.with_room(ledger, mask_of(step.mask, n), lambda some: some.with_step(tokens), tokens)
            for n, ledger in enumerate(cache.ledgers())
        ]
        cache.shrink(ledgers)
    return horizon


def _require_kept(step: DecodeStep, horizon: Horizon, tokens: int) -> None:
    """Refuse a step whose tokens see keys that have been dropped."""
    cache = step.cache
    for n, (row, length) in enumerate(zip(cache.rows, cache.lengths, strict=True)):
        # The ledger need not be up to date: tokens of later steps are all stored.
        ledger = cache.records.ledgers[row]
        if horizon.needs_dropped(n, ledger, length, tokens):
            raise ValueError(dropped_problem(mask_of(step.mask, n), cache.ledgers()[n]))


def _horizon(step: DecodeStep, tokens: int) -> Horizon:
    """The cached horizon of the mask. If all positions fit into the cache it starts at 0, and serves for all steps."""
    cache, calls = step.cache, step.cache.cp.calls
    mask = calls.by_value(ByIdentity(step.mask))
    of_sequences = cache.lengths
    first, stop = min(of_sequences), max(of_sequences) + tokens
    horizon = cache.records.horizons.get(mask)
    if horizon is None or not horizon.covers(first, stop):
        start, count = (0, cache.capacity) if stop <= cache.capacity else (first, stop - first + cache.capacity)
        horizon = calls.horizon(mask, start, count, cache.store.k.device)
        cache.records.remember(mask, horizon)
    return horizon


def _known(step: DecodeStep) -> Horizon:
    """The horizon for a captured step, which an earlier step has made."""
    horizon = step.cache.records.horizons.get(step.cache.cp.calls.by_value(ByIdentity(step.mask)))
    if horizon is None:
        raise ValueError(
            "cache: a step is captured in a CUDA graph before any with its mask has run; run one outside of the graph "
            "first, and cache.truncate(n) what it appended"
        )
    step.cache.records.keep.append(horizon)
    return horizon


def _agree(q: Tensor, asked: Problem, kernel: Kernel, step: DecodeStep) -> None:
    """Compare the step over the ranks. Lengths are not in the signature; they are sent with the results."""
    cp = step.cache.cp
    key = (asked, q.shape[:2], cp.calls.by_value(ByIdentity(step.mask)), step.scale, step.cache.capacity)
    cp.agreement.require(
        STEP,
        lambda: {
            "batch": q.shape[0],
            "tokens": q.shape[1],
            "tokens in the cache (cache.lengths)": step.cache.lengths,
            "capacity": step.cache.capacity,
            "heads": asked.heads,
            "kv_heads": asked.kv_heads,
            "head_dim": asked.d_qk,
            "value head_dim": asked.d_v,
            "dtype": asked.dtype,
            "mask": step.mask,
            "scale": step.scale,
            "softcap": step.softcap,
            "sinks": asked.sinks,
            "alibi_slopes": asked.alibi,
            "kernel": kernel,
        },
        key=key,
    )
