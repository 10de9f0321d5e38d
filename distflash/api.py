"""The public function: `attention`.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v.
"""

from __future__ import annotations

from typing import Literal, Never, TypedDict, Unpack, overload

from torch import Tensor

from distflash import keywords, lengths, ops, prefill, repeats, transforms, validation
from distflash.cache import Cache
from distflash.context import ALONE, ContextParallel
from distflash.dropout import as_seed
from distflash.given import PLAIN, Given, Options
from distflash.integers import as_int
from distflash.layouts import Layout
from distflash.mask_algebra import Mask
from distflash.masks import Full


class _Keywords(TypedDict, total=False):
    """The keywords of `attention`, except ``return_lse`` and ``return_max_logits``, which decide the result's type."""

    mask: Mask
    cp: ContextParallel | None
    seq_len: int | None
    q_start: int
    q_len: int | None
    kv_layout: Layout | None
    cache: Cache | None
    scale: float | Tensor | None
    softcap: float | Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None


# fmt: off
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, return_max_logits: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], return_max_logits: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, return_max_logits: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], return_max_logits: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, return_max_logits: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, return_max_logits: bool,
    **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]: ...
# fmt: on
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Full(),
    cp: ContextParallel | None = None,
    seq_len: int | None = None,
    q_start: int = 0,
    q_len: int | None = None,
    kv_layout: Layout | None = None,
    cache: Cache | None = None,
    scale: float | Tensor | None = None,
    softcap: float | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Exact attention of this rank's queries over the keys of all ranks, softmax(q k^T * scale + mask) v.

    Args:
        q: ``[batch, seq_local, heads, d_qk]``, this rank's tokens in ascending global position
            (`ContextParallel.shard`).
        k: ``[batch, seq_local, kv_heads, d_qk]``; heads is a multiple of kv_heads (GQA, MQA).
        v: ``[batch, seq_local, kv_heads, d_v]``. q, k and v share dtype and device.
        mask: which keys a query sees. Combine with ``&`` and ``|``. Where sequences of the batch differ: `Rows`.
        cp: the group that holds the sequence; None: this device holds all of it.
        seq_len: the global number of keys. May be left out if all ranks hold the same number of keys, or if the mask
            knows it.
        q_start, q_len: q holds the queries at global positions ``[q_start, q_start + q_len)``. cp's layout shards them
            as if they were a whole sequence of ``q_len`` tokens. Default: self-attention over all tokens. Under `Full`,
            q may come from another sequence (cross-attention). ``q_len`` may be left out if ``q_start`` is given and
            all ranks hold the same number of queries.
        kv_layout: the layout of keys and values, if it is not cp's layout.
        cache: keys and values of earlier tokens, see `Cache`. The call appends its k and v. Its queries see the keys in
            the cache that the mask allows; the mask is over positions of the whole sequence. ``seq_len`` is then the
            number of tokens of this chunk. No gradient.
        scale: multiplies ``q k^T``; ``d_qk ** -0.5`` by default. A number or a tensor ``[]``. No gradient: for a scale
            that is learned or differs between heads, multiply q.
        softcap: scores become ``softcap * tanh(score / softcap)``; None or 0 for none. A number, no gradient.
        alibi_slopes: ``[heads]``; ``slope * |i - j|`` of global positions is subtracted from the scores
            (https://arxiv.org/abs/2108.12409). No gradient.
        sinks: ``[heads]``, one extra logit per head in the softmax's denominator, without a value vector.
            Differentiable: each rank's gradient is partial, as for any replicated parameter; sum it over ranks.
        dropout_p: attention dropout: each probability of the softmax is dropped with this probability, a multiple of
            2^-16, and those that are kept are multiplied by ``1 / (1 - dropout_p)``. lse is that of all scores.
        dropout_seed: with global positions, head and batch it decides which are dropped (`dropout_mask`): an int, or an
            int64 tensor ``[]`` on q's device, which the host does not read. Required if ``dropout_p`` is not 0: the
            same on all ranks, and new in each layer and step. Do not change the tensor in place before backward.
        return_lse: also return the log-sum-exp of the scores. Differentiable.
        return_max_logits: also return the largest score of each head, for QK-clip (docs/numerics.md). No gradient. Not
            with a cache.
        unknown: other keywords raise; for those of other attention libraries the error gives the equivalent.

    Returns:
        out ``[batch, seq_local, heads, d_v]`` in q's dtype; with ``return_lse`` also lse
        ``[batch, heads, seq_local]``, float32, natural log. A query that sees no key has out 0, lse -inf and
        gradients 0. With ``return_max_logits`` also, and last, max_logits ``[heads]``, float32 (float64 for float64
        inputs): the maximum of the scaled scores, after softcap and ALiBi and without sinks, over the batch, all keys
        that queries see, and all ranks, which get the same bits; -inf where no query sees a key.

    Raises:
        ValueError: before anything is computed or sent: an argument is wrong, no kernel supports the call, ranks
            disagree, or forward-mode AD or torch.func.grad is used; only backward() and autograd.grad are supported.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD)
        >>> q, k, v = (torch.randn(1, 100, heads, 64) for heads in (8, 2, 2))  # this rank's tokens of 200
        >>> out, lse = df.attention(q, k, v, mask=df.Causal() & df.Window(63), cp=cp, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 100, 8, 64]), torch.Size([1, 8, 100]))
    """
    cp = (cache.cp if isinstance(cache, Cache) else ALONE) if cp is None else cp
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp: expected a ContextParallel or None, got {cp!r}; make one of the process group first")
    key = None
    if (
        not unknown
        and cache is None
        and sinks is None
        and alibi_slopes is None
        and dropout_seed is None
        and kv_layout is None
    ):
        sizes, numbers = (seq_len, q_start, q_len), (scale, softcap, dropout_p)
        key = repeats.key_of((q, k, v), mask, cp.layout, sizes, numbers, return_max_logits)
        if key is not None and (repeat := cp.repeats.get(key)) is not None:
            return _asked(ops.eager(q, k, v, PLAIN, repeat[0]), return_lse, return_max_logits)
    self_attention = q_len is None and kv_layout is None and as_int(q_start) == 0
    # The error message of the first check that fails, or None. (Not a `kernels.Problem`.)
    problem = (
        keywords.problem(unknown)
        or transforms.problem(q=q, k=k, v=v, sinks=sinks, scale=scale, softcap=softcap)
        or validation.call_problem(
            q, k, v, mask, sinks, alibi_slopes, scale, softcap, dropout_p, self_attention, dropout_seed
        )
        or validation.device_problem(q, cp.transport)
        or (None if seq_len is None else lengths.seq_len_problem(seq_len))
        or lengths.queries_problem(q_start, q_len, kv_layout)
        or (None if cache is None else prefill.cache_problem(cache, self_attention, return_max_logits, dropout_p))
    )
    if problem is not None:
        cp.refuse(problem, in_attention=True)
    tokens = lengths.as_given(seq_len, q_start, q_len)
    scale = validation.as_number(scale)
    softcap, dropout_p = ((validation.as_number(x) or 0.0) + 0.0 for x in (softcap, dropout_p))  # -0.0 is 0.0
    if cache is not None:
        tokens_of_chunk = k.shape[1] * cp.world_size if seq_len is None else lengths.as_length(seq_len)
        forward = prefill.Forward(
            cp, cache, mask, tokens_of_chunk, Options(scale, softcap, dropout_p), sinks, alibi_slopes
        )
        out, lse = prefill.prefill(q, k, v, forward)
        return (out, lse) if return_lse else out
    seed = None
    if dropout_p and dropout_seed is not None:
        if (problem := validation.captured_seed_problem(q, dropout_seed)) is not None:
            cp.refuse(problem, in_attention=True)
        seed = as_seed(dropout_seed, q.device)
    recipe_id, data = cp.recipe(mask, Options(scale, softcap, dropout_p, kv_layout, max_logits=return_max_logits))
    if key is None:
        found = ops.call(q, k, v, sinks, alibi_slopes, seed, tokens, recipe_id, data)
    else:
        prepared = ops.prepare(q, k, v, Given(tokens), recipe_id, data)
        repeats.remember(cp.repeats, key, prepared, mask, cp.layout)
        found = ops.eager(q, k, v, PLAIN, prepared)
    return _asked(found, return_lse, return_max_logits)


def _asked(
    found: tuple[Tensor, Tensor, Tensor | None], return_lse: bool, return_max_logits: bool
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Of ``(out, lse, max_logits)``, what the caller asked for."""
    out, lse, max_logits = found
    if return_max_logits:
        assert max_logits is not None
        return (out, lse, max_logits) if return_lse else (out, max_logits)
    return (out, lse) if return_lse else out
