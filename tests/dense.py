"""Whole attention problems: dense in float64 by autograd, the oracle, and spread over ranks, as users call it.

[Note: shapes] B batch, T local tokens, S global tokens, Q global queries (S in self-attention), H query heads,
G key/value heads, D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import distflash as df
from distflash.schedules import Schedule

Results = dict[str, Tensor]

# Which dimension of a result counts tokens; results without one are sums over tokens.
TOKENS = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1, "dsinks": None}
OF_KEYS = ("dk", "dv")


@dataclass(frozen=True)
class Problem:
    """One attention call on a whole sequence, forward and backward; its tensors follow from ``seed``.

    Attributes:
        q_start, q_len, kv_layout: as in `df.attention`.
    """

    mask: df.Mask = field(default_factory=df.Causal)
    seq_len: int = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    d_qk: int = 8
    d_v: int = 8
    dtype: torch.dtype = torch.float64
    scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    dropout_seed: int = 1
    seed: int = 0
    q_start: int = 0
    q_len: int | None = None
    kv_layout: df.Layout | None = None

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return self.seq_len if self.q_len is None else self.q_len


@dataclass(frozen=True)
class Inputs:
    """The tensors of a problem: ``q, k, v, dout`` have tokens in dimension 1, ``dlse`` in dimension 2.

    ``q, dout, dlse`` are of the Q queries, ``k, v`` of the S keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    sinks: Tensor | None
    slopes: Tensor | None


def make_inputs(p: Problem) -> Inputs:
    generator = torch.Generator().manual_seed(p.seed)
    wide = torch.promote_types(p.dtype, torch.float32)

    def normal(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Inputs(
        q=normal(p.batch, p.queries, p.heads, p.d_qk),
        k=normal(p.batch, p.seq_len, p.kv_heads, p.d_qk),
        v=normal(p.batch, p.seq_len, p.kv_heads, p.d_v),
        dout=normal(p.batch, p.queries, p.heads, p.d_v),
        dlse=normal(p.batch, p.heads, p.queries, dtype=wide),
        sinks=normal(p.heads, dtype=wide) if p.sinks else None,
        slopes=2.0 ** -torch.arange(1, p.heads + 1) if p.alibi else None,
    )


def dense(p: Problem, x: Inputs) -> Results:
    """Dense attention in float64; gradients by autograd."""
    q, k, v = (t.double().requires_grad_() for t in (x.q.clone(), x.k.clone(), x.v.clone()))
    sinks = None if x.sinks is None else x.sinks.clone().double().requires_grad_()
    s = scores(p, q, k, x.slopes)
    sink_column = s.new_full((*s.shape[:-1], 1), -torch.inf)
    if sinks is not None:
        sink_column = sinks[None, :, None, None].expand_as(sink_column)
    s = torch.cat([s, sink_column], dim=-1)
    # A query that sees nothing: any finite scores, then 0 and -inf by decree, with no gradient.
    blind = (s == -torch.inf).all(-1)
    s = s.masked_fill(blind[..., None], 0.0)
    probability = s.softmax(-1)[..., :-1].masked_fill(blind[..., None], 0.0)
    out = torch.einsum("bhij,bjhd->bihd", dropped(p, probability), per_query_head(p, v))
    lse = s.logsumexp(-1).masked_fill(blind, -torch.inf)
    torch.autograd.backward((out, lse), (x.dout.double(), x.dlse.double()))
    return _results(out, lse, q, k, v, sinks)


def scores(p: Problem, q: Tensor, k: Tensor, slopes: Tensor | None) -> Tensor:
    """``[B, H, Q, S]``, -inf where the mask forbids."""
    s = torch.einsum("bihd,bjhd->bhij", q, per_query_head(p, k)) * (p.d_qk**-0.5 if p.scale is None else p.scale)
    if p.softcap:
        s = p.softcap * torch.tanh(s / p.softcap)
    queries, keys = torch.arange(p.queries, device=q.device) + p.q_start, torch.arange(p.seq_len, device=q.device)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * (queries[:, None] - keys).abs()
    return s.masked_fill(~visible(p, q.device), -torch.inf)


def dropped(p: Problem, probability: Tensor) -> Tensor:
    """Probabilities ``[B, H, Q, S]`` after dropout."""
    if not p.dropout_p:
        return probability
    device = probability.device
    queries, keys = torch.arange(p.queries, device=device) + p.q_start, torch.arange(p.seq_len, device=device)
    seed = torch.tensor(p.dropout_seed, device=device)
    if isinstance(p.mask, df.Rows):  # one sequence of all rows
        rows = [n * p.seq_len for n in range(p.batch)]
        of_rows = [df.dropout_mask(seed, p.dropout_p, 1, p.heads, queries + n, keys + n) for n in rows]
        kept = torch.cat(of_rows) if rows else probability.bool()
    else:
        kept = df.dropout_mask(seed, p.dropout_p, p.batch, p.heads, queries, keys)
    share = 1 - round(p.dropout_p * 2**16) / 2**16
    return probability * kept / share


def visible(p: Problem, device: torch.device) -> Tensor:
    """Which keys a query sees, broadcastable to ``[B, H, Q, S]``."""
    queries, keys = torch.arange(p.queries, device=device) + p.q_start, torch.arange(p.seq_len, device=device)
    seen = p.mask.materialize(queries, keys, p.seq_len)
    return seen[:, None] if isinstance(p.mask, df.Rows) else seen


def per_query_head(p: Problem, x: Tensor) -> Tensor:
    """Expand key heads ``[B, S, G, D]`` to query heads; query heads stay unchanged."""
    return x.repeat_interleave(p.heads // x.shape[2], dim=2)


def on_rank(p: Problem, x: Inputs, cp: df.ContextParallel | None) -> Results:
    """This rank's part of the results, from inputs that every rank holds in full."""
    shard = (lambda t, dim=1: t.clone()) if cp is None else cp.shard
    q, k, v = (t.requires_grad_() for t in (shard(x.q), *(keys_of(p, t, cp) for t in (x.k, x.v))))
    sinks = None if x.sinks is None else x.sinks.clone().requires_grad_()
    out, lse = df.attention(q, k, v, cp=cp, alibi_slopes=x.slopes, sinks=sinks, return_lse=True, **options(p))
    torch.autograd.backward((out, lse), (shard(x.dout), shard(x.dlse, dim=2)))
    return _results(out, lse, q, k, v, sinks)


def options(p: Problem) -> dict[str, Any]:
    """The keywords of a call that are no tensors."""
    names = ("mask", "seq_len", "q_start", "q_len", "kv_layout", "scale", "softcap", "dropout_p", "dropout_seed")
    return {name: getattr(p, name) for name in names}


def keys_of(p: Problem, x: Tensor, cp: df.ContextParallel | None) -> Tensor:
    """This rank's keys."""
    if cp is None or p.kv_layout is None:
        return x.clone() if cp is None else cp.shard(x)
    return x[:, p.kv_layout.positions(p.seq_len, cp.world_size, cp.rank).to(x.device)]


def join(
    parts: Sequence[Results],
    layout: df.Layout,
    seq_len: int,
    kv_layout: df.Layout | None = None,
    kv_len: int | None = None,
) -> Results:
    """Whole results from every rank's.

    Args:
        layout, seq_len: of the queries.
        kv_layout, kv_len: of the keys, if they differ from the queries'.
    """
    W = len(parts)

    def order(layout: df.Layout, tokens: int) -> Tensor:
        return torch.cat([layout.positions(tokens, W, rank) for rank in range(W)]).argsort()

    def whole(name: str) -> Tensor:
        tensors, dim = [part[name] for part in parts], TOKENS[name]
        if dim is None:
            return torch.stack(tensors).sum(0)
        keys = name in OF_KEYS
        back = order((keys and kv_layout) or layout, kv_len if keys and kv_len is not None else seq_len)
        return torch.cat(tensors, dim).index_select(dim, back.to(tensors[0].device))

    return {name: whole(name) for name in parts[0]}


def on_ranks(
    p: Problem,
    x: Inputs,
    world_size: int,
    layout: df.Layout,
    kernel: df.kernels.Kernel | None = None,
    schedule: Schedule | None = None,
) -> Results:
    """The unsharded results of the problem on simulated ranks."""
    kernel = df.kernels.Reference() if kernel is None else kernel
    parts = df.transport.Simulator(world_size).run(
        lambda transport: on_rank(p, x, df.ContextParallel(transport, layout, schedule or df.Ring(), kernel))
    )
    return join(parts, layout, p.queries, p.kv_layout, p.seq_len)


def assert_exact(p: Problem, x: Inputs, got: Results) -> None:
    """Assert equality with dense attention in float64, up to rounding."""
    truth = dense(p, x)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        torch.testing.assert_close(
            value.double(), truth[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_no_less_exact(p: Problem, x: Inputs, got: Results, one_rank: Results) -> None:
    """Error against float64 at most 1.1 times that of the same kernel on one rank.

    Plus a floor, since one rank that sums few numbers may be exact by luck: one rounding unit of float32, the dtype of
    all sums, relative to the result (for gradients to the largest of them: a small one is a difference of large terms),
    times the largest score, because probabilities are as inexact relatively as their scores are absolutely. That is a
    thousandth of what storing the result in bfloat16 costs.
    """
    truth = dense(p, x)
    unit = torch.finfo(torch.float32).eps * max(1.0, largest_score(p, x))
    gradients = [name for name in truth if name not in ("out", "lse")]
    for name in truth:
        size = max(_norm(truth[n]) for n in (gradients if name in gradients else [name]))
        error, bar = (_error(result[name], truth[name]) for result in (got, one_rank))
        limit = 1.1 * bar + unit * size
        assert got[name].dtype == one_rank[name].dtype
        assert torch.equal(got[name] == -torch.inf, truth[name] == -torch.inf), f"{name}: which rows see nothing"
        assert error <= limit, f"{name}: error {error:.3e}, on one rank {bar:.3e}, limit {limit:.3e}"


def relative_errors(p: Problem, x: Inputs, got: Results) -> dict[str, float]:
    truth = dense(p, x)
    return {name: _error(got[name], truth[name]) / _norm(truth[name]) for name in truth}


def in_dtype(p: Problem, dtype: torch.dtype) -> Problem:
    return replace(p, dtype=dtype)


def largest_score(p: Problem, x: Inputs) -> float:
    """The largest magnitude of an unmasked score."""
    s = scores(p, x.q.double(), x.k.double(), x.slopes)
    seen = s[s > -torch.inf].abs()
    return float(seen.max()) if len(seen) else 0.0


def _error(got: Tensor, truth: Tensor) -> float:
    return _norm(torch.where(truth == -torch.inf, 0.0, got.double() - truth))


def _norm(t: Tensor) -> float:
    """The 2-norm without the -inf of rows with no visible key; NaN counts."""
    return float(torch.where(t == -torch.inf, 0.0, t).norm())


def _results(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Results:
    results = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        results["dsinks"] = sinks.grad
    assert all(t is not None for t in results.values())
    return {name: t.detach() for name, t in results.items()}


def assert_largest(p: Problem, x: Inputs, found: Tensor) -> None:
    """The largest scores ``[heads]`` are as near to those in float64 as the accumulator's dtype allows.

    A sum of n products has an error of at most n roundings of the sum of their absolute values, in whatever order they
    are added (Higham 2002, section 3.1). Scaling, softcap and ALiBi, and changing the base and back, round four times.
    """
    q, k = x.q.double(), x.k.double()
    s = scores(p, q, k, x.slopes).flatten(2)
    truth = torch.cat([s, s.new_full((*s.shape[:2], 1), -torch.inf)], 2).amax(2).amax(0)
    products = torch.einsum("bihd,bjhd->hbij", q.abs(), per_query_head(p, k).abs()).flatten(1)
    largest = 0.0 if not products.numel() else products.amax(1) * abs(p.d_qk**-0.5 if p.scale is None else p.scale)
    if x.slopes is not None:
        largest = largest + x.slopes.double() * (p.seq_len + p.queries + p.q_start)
    assert found.dtype == torch.promote_types(p.dtype, torch.float32)
    unseen = truth == -torch.inf
    assert torch.equal(found == -torch.inf, unseen)
    error = (found.double() - truth).masked_fill(unseen, 0.0).abs()
    rounding = torch.finfo(found.dtype).eps / 2
    assert (error <= (p.d_qk + 4) * rounding * largest).all(), (error, largest)
