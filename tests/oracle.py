"""What attention kernels are checked against: dense attention in plain torch, and the cases to check.

[Note: shapes] T queries of the rank under test, S global tokens, W ranks; otherwise as in `distflash.kernels.base`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distflash import masks
from distflash.dropout import Dropout
from distflash.geometry import Geometry
from distflash.intervals import build
from distflash.kernels.base import Kernel, KeyGradient, Keys, QueryGradient, Scores
from distflash.layouts import Contiguous, Layout, Striped, Zigzag
from distflash.mask_algebra import Mask
from distflash.overlap import defer_dq, defer_heads, defer_heads_to_the_end, skip_rows
from distflash.partial import Partial, accumulator_dtype
from distflash.plan import Pass, Stage


@dataclass(frozen=True)
class Case:
    """One rank's attention over the keys of all ranks, one pass per source."""

    name: str
    mask: Mask = field(default_factory=masks.Causal)
    seq_len: int = 150
    layout: Layout = field(default_factory=Contiguous)
    world_size: int = 1
    rank: int = 0
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    d_qk: int = 32
    d_v: int = 32
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dlse: bool = False
    dropout: Dropout | None = None

    @property
    def geometry(self) -> Geometry:
        return Geometry.of_sequence(self.mask, self.layout, self.seq_len, self.world_size)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a case: q and dout of the rank, k and v of all ranks in global order."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    scores: Scores
    visible: Tensor
    q_positions: Tensor


HEAD_DIMS = [(16, 16), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def of_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> Case:
    qk, v = dims
    return Case(f"head dims {qk}/{v} {_short(dtype)}", d_qk=qk, d_v=v, dtype=dtype, seq_len=100, heads=1, kv_heads=1)


def cases() -> list[Case]:
    """All head dims in all dtypes, and every feature."""
    return [*(of_head_dims(dims, dtype) for dims in HEAD_DIMS for dtype in DTYPES), *features()]


def features() -> list[Case]:
    """Every feature, small enough for Triton's interpreter."""
    d = masks.Documents
    lengths = [Case(f"length {n}", seq_len=n, dtype=torch.bfloat16) for n in (1, 2, 63, 64, 65, 128, 191)]
    kinds = [
        Case("full", masks.Full()),
        Case("causal, two of a batch", batch=2, dlse=True),
        Case("window", masks.Window(20, 0), 300),
        Case("window to both sides", masks.Window(40, 17), 300),
        Case("wide window", masks.Window(150, 150), 300, dtype=torch.bfloat16),
        Case("documents", d((0, 3, 70, 71, 134, 150)), 150),
        Case("causal documents", masks.Causal() & d((0, 100, 101, 300)), 300, dtype=torch.bfloat16),
        Case("prefix", masks.PrefixLM(70), 200),
        Case("chunked", masks.Chunked(48), 200),
        Case("window within documents", masks.Window(30, 5) & d((0, 90, 200)), 200),
    ]
    groups = [
        Case(f"{h} heads for {g}, {_short(dtype)}", heads=h, kv_heads=g, dtype=dtype, batch=2, seq_len=130)
        for h, g in ((4, 2), (3, 1))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    options_of_scores = [
        Case(f"{name}, {_short(dtype)}", dtype=dtype, heads=4, kv_heads=2, seq_len=130, **options)
        for name, options in {
            "softcap": dict(softcap=5.0, scale=1.0),
            "alibi": dict(alibi=True),
            "sinks": dict(sinks=True),
            "negative scale": dict(scale=-0.2),
            "all at once": dict(softcap=5.0, alibi=True, sinks=True, dlse=True, mask=masks.Window(50, 10)),
        }.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    hops = [
        Case("two hops, full", masks.Full(), 260, world_size=2, rank=0, dtype=torch.bfloat16, dlse=True),
        Case("two hops, causal", seq_len=260, world_size=2, rank=1, dtype=torch.bfloat16),
        # The first rank sees nothing of the second's keys, and some rows see nothing at all.
        Case("a hop without work", seq_len=260, world_size=2, rank=0, sinks=True),
        Case("zigzag", seq_len=400, layout=Zigzag(), world_size=2, rank=0, dtype=torch.bfloat16),
        Case("zigzag of three", seq_len=401, layout=Zigzag(), world_size=3, rank=1),
        Case("striped", seq_len=401, layout=Striped(), world_size=3, rank=1, dtype=torch.bfloat16),
        Case("window in zigzag", masks.Window(64, 0), 401, Zigzag(), 3, 2, sinks=True, heads=4),
        Case("documents, striped", d((0, 5, 120, 121, 400)), 400, Striped(), 2, 1, alibi=True),
        Case("all in two hops", masks.Causal() & d((0, 90, 300)), 300, Zigzag(), 2, 1, heads=4, softcap=5.0,
             alibi=True, sinks=True),
        Case("rows that see nothing", Blind(40, 90), 200, dtype=torch.bfloat16, dlse=True),
        Case("rows that see nothing, two hops", Blind(40, 90), 200, Striped(), 2, 0, sinks=True),
    ]  # fmt: skip
    return lengths + kinds + groups + options_of_scores + hops


@dataclass(frozen=True)
class Blind(Mask):
    """Causal, but queries of ``[start, stop)`` see no key, and later queries see only keys from ``stop`` on."""

    start: int
    stop: int

    def ends(self, positions: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        after = positions >= self.stop
        lo = torch.where(after, self.stop, 0)
        hi = torch.where(after, positions + 1, (positions + 1).clamp_max(self.start))
        blind = (positions >= self.start) & ~after
        return torch.where(blind, self.start, lo), torch.where(blind, self.start, hi)


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    B, H, G = case.batch, case.heads, case.kv_heads
    positions = case.geometry.queries.positions(case.rank)
    T = len(positions)
    visible = case.mask.materialize(positions, torch.arange(case.seq_len), case.seq_len)
    return Inputs(
        q=normal(B, T, H, case.d_qk),
        k=normal(B, case.seq_len, G, case.d_qk),
        v=normal(B, case.seq_len, G, case.d_v),
        dout=normal(B, T, H, case.d_v),
        dlse=normal(B, H, T, dtype=torch.float32) if case.dlse else None,
        scores=Scores(
            scale=case.d_qk**-0.5 if case.scale is None else case.scale,
            softcap=case.softcap,
            alibi_slopes=0.5 ** torch.arange(1, H + 1, device=device, dtype=torch.float32) if case.alibi else None,
            sinks=normal(H, dtype=torch.float32) if case.sinks else None,
            dropout=case.dropout and replace(case.dropout, seed=case.dropout.seed.to(device)),
        ),
        visible=visible.to(device),
        q_positions=positions.to(device),
    )


def dense(x: Inputs, compute: torch.dtype, stored: torch.dtype | None = None) -> dict[str, Tensor]:
    """Dense attention and its gradients.

    Args:
        compute: the dtype of the computation; float64 for the reference.
        stored: the dtype to which out, P and dS are rounded where kernels round them (before the second matrix products
            and at the end); None for no rounding. With ``compute`` float32, a bound for a kernel's error.
    """

    def rounded(t: Tensor) -> Tensor:
        return t if stored is None else t.to(stored).to(compute)

    group = x.q.shape[2] // x.k.shape[2]
    q, dout = (t.to(compute).transpose(1, 2) for t in (x.q, x.dout))
    k, v = (t.to(compute).transpose(1, 2).repeat_interleave(group, 1) for t in (x.k, x.v))
    s = q @ k.mT * x.scores.scale
    slope_of_cap = torch.ones_like(s)
    if x.scores.softcap:
        t = torch.tanh(s / x.scores.softcap)
        s, slope_of_cap = x.scores.softcap * t, 1 - t * t
    if x.scores.alibi_slopes is not None:
        keys = torch.arange(k.shape[2], device=q.device)
        distance = (x.q_positions[:, None] - keys[None, :]).abs()
        s = s - x.scores.alibi_slopes.to(compute)[:, None, None] * distance
    s = s.masked_fill(~x.visible, -torch.inf)
    nothing = s.new_full((1, s.shape[1]), -torch.inf)  # where there is no batch, query or key
    lse, maxima = torch.logsumexp(s, -1), torch.cat([s.movedim(1, 3).flatten(0, 2), nothing]).amax(0)
    if x.scores.sinks is not None:
        lse = torch.logaddexp(lse, x.scores.sinks.to(compute)[None, :, None])
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    factor = dropout_factor(x, k.shape[:3]).to(compute)
    out = rounded(rounded(p * factor) @ v)
    delta = (out * dout).sum(-1)
    if x.dlse is not None:
        delta = delta - x.dlse.to(compute)
    ds = p * (factor * (dout @ v.mT) - delta[..., None]) * slope_of_cap
    dq = rounded(ds) @ k * x.scores.scale
    dk = (rounded(ds).mT @ q * x.scores.scale).unflatten(1, (-1, group)).sum(2)
    dv = (rounded(p * factor).mT @ dout).unflatten(1, (-1, group)).sum(2)
    gradients = {"dq": rounded(dq), "dk": rounded(dk), "dv": rounded(dv)}
    results = {"out": out.transpose(1, 2), "lse": lse, "max_logits": maxima}
    return results | {n: t.transpose(1, 2) for n, t in gradients.items()}


def dropout_factor(x: Inputs, size: torch.Size) -> Tensor:
    """What probabilities are multiplied by after the softmax. size: B, H, S."""
    dropout = x.scores.dropout
    if dropout is None:
        return torch.ones((), device=x.q.device)
    keys = torch.arange(size[2], device=x.q.device)
    return dropout.kept(size[0], range(size[1]), x.q_positions, keys).double() * dropout.keep_scale


def run(
    kernel: Kernel, case: Case, x: Inputs, held_back: int = 0, live: bool = True, maxima: bool = False
) -> dict[str, Tensor]:
    """The case by a kernel: one pass a source, forward and backward, every output poisoned beforehand.

    Args:
        held_back: if not 0, the key heads below this take the first two sources one after the other; the others take
            both at once. Backward these take the first source before the others, which take it last. See `overlap`.
        live: whether rows are left out of passes in which they see nothing; otherwise all are in every pass.
        maxima: whether the largest score of each head is found, too, as ``max_logits``.

    Returns:
        out, lse, dq, dk, dv as `dense` does; dk and dv put together from the sources'.
    """
    device, W = x.q.device, case.world_size
    # Sources as a ring visits them, from the rank itself backwards. All passes are made, even those without work.
    sources = [(case.rank - n) % W for n in range(W)]
    keys, positions, passes = {}, {}, []
    for n, source in enumerate(sources):
        positions[source] = case.geometry.keys.positions(source).to(device)
        (whole,) = build(case.geometry, case.rank, source)
        rows = whole.to(device)
        keys[source] = Keys(x.k[:, positions[source]], x.v[:, positions[source]], rows)
        passes.append(Pass(case.rank, (source,), (rows,), first=n == 0, last=n == W - 1))

    into = Partial.empty(x.q, case.d_v, between=W > 1, maxima=maxima)
    for buffer in (into.final, into.lse, *(into.running.tensors if into.running else ())):
        buffer.fill_(torch.nan)
    stages = [Stage(passes=(each,)) for each in passes]
    ahead = defer_heads(stages, case.rank, held_back) if held_back else stages
    for stage in skip_rows(ahead) if live else ahead:
        for each in stage.passes:
            kernel.forward(x.q, tuple(keys[s] for s in each.sources), each, x.scores, into)

    saved = kernel.preprocess(x.q, into.final, into.lse, x.dout, x.dlse)
    wide = accumulator_dtype(case.dtype)
    if saved.dq_accum is not None:
        saved.dq_accum.fill_(torch.nan)
    dq = QueryGradient(_poison(x.q), _poison(x.q, wide) if W > 1 and saved.dq_accum is None else None)
    # A pass's share is handed over in float32 where shares are still to be added, else rounded by the kernel.
    dtype = wide if W > 1 else case.dtype
    shares = {s: KeyGradient(_poison(keys[s].k, dtype), _poison(keys[s].v, dtype)) for s in sources}
    back = [*stages, Stage()]
    if held_back and saved.dq_accum is not None:
        back = list(defer_heads_to_the_end(back, case.rank, held_back, x.k.shape[2]))
        assert len(back[-1].passes) == 1
    elif kernel.abilities(device).separate_gradients:
        back = list(defer_dq(back))
    for stage in back:
        for each in stage.passes:
            (source,) = each.sources
            kernel.backward(saved, keys[source], each, x.scores, dq, shares[source])
    dk, dv = (torch.full(t.shape, torch.nan, device=device, dtype=case.dtype) for t in (x.k, x.v))
    for source, share in shares.items():
        dk[:, positions[source]], dv[:, positions[source]] = share.dk.to(case.dtype), share.dv.to(case.dtype)
    results = {"out": into.final, "lse": into.lse, "dq": dq.final, "dk": dk, "dv": dv}
    return results | ({"max_logits": into.max_logits(kernel.base)} if maxima else {})


def window_rings(world_size: int, tokens: int, **options: Any) -> list[Case]:
    """Rings with a window shorter than the ``tokens`` of a rank, and a few rows with no visible key."""
    layouts: list[Layout] = [Contiguous(), Zigzag(), Striped()]
    window = masks.Window(tokens // 3, 0)
    return [
        Case(f"{layout}, rank {rank} of {world_size}, {mask}", mask, tokens * world_size, layout, world_size, rank,
             **options)
        for layout in layouts
        for mask in (window, window & Blind(tokens // 2, tokens))
        for rank in {0, 1, world_size - 1}
    ]  # fmt: skip


def check(
    kernel: Kernel,
    case: Case,
    device: torch.device | str = "cpu",
    held_back: int = 0,
    live: bool = True,
    maxima: bool = False,
) -> None:
    """Assert that the kernel is as exact as dense float32 attention with the same roundings."""
    x = make_inputs(case, device)
    got = run(kernel, case, x, held_back, live, maxima)
    truth = dense(x, torch.float64)
    plain = dense(x, torch.float32, stored=case.dtype)
    unseen = truth["lse"] == -torch.inf
    assert torch.equal(got["lse"] == -torch.inf, unseen)
    blind = ~x.visible.any(1)
    for name in ("out", "dq"):
        assert (got[name][:, blind] == 0).all(), f"{name} of a query that sees nothing"
    for name in ("dk", "dv"):
        assert (got[name][:, ~x.visible.any(0)] == 0).all(), f"{name} of a key that nobody sees"
    if maxima:
        assert_largest(x, got.pop("max_logits"), truth["max_logits"])
    for name in got:
        keep = ~unseen if name == "lse" else slice(None)
        dtype = torch.float32 if name == "lse" else case.dtype
        assert_as_exact(name, got[name][keep], plain[name][keep], truth[name][keep], dtype)


def assert_largest(x: Inputs, got: Tensor, truth: Tensor) -> None:
    """As near to the truth as a sum of products in float32 can be: a unit of the sum of the magnitudes, and one for
    each of softcap and ALiBi, in which numbers of that size are rounded.
    """
    q, k = (t.double().abs().amax((0, 1)) for t in (x.q, x.k))  # [heads, D]
    terms = (q * k.repeat_interleave(len(q) // len(k), 0)).sum(-1) * abs(x.scores.scale) + x.scores.softcap
    if x.scores.alibi_slopes is not None:
        terms += x.scores.alibi_slopes.double() * x.visible.numel() ** 0.5
    unseen = truth == -torch.inf
    assert torch.equal(got == -torch.inf, unseen)
    error = (got.double() - truth).masked_fill(unseen, 0.0).abs()
    assert got.dtype == torch.float32 and (error <= torch.finfo(got.dtype).eps * terms).all(), (error, terms)


def assert_as_exact(name: str, got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Error against float64 at most a few times that of dense float32 arithmetic with the same roundings.

    A kernel rounds at the same places but other numbers: P before its division by the sum, partial sums in another
    order. With short inputs the roundings of P and dS weigh most: twice. With float32 inputs the order of the sums is
    all there is, and a matrix library splits a long sum into parts where the kernel adds one tile after another: three
    times. The unit roundoff is granted besides, where both errors are no more than how the result is stored.
    """
    times = 3 if dtype == torch.float32 else 2
    assert got.dtype == dtype, f"{name}: {got.dtype}"
    unit = torch.finfo(dtype).eps / 2
    error, bar = (got.double() - truth).norm(), (plain.double() - truth).norm()
    limit = times * bar + unit * truth.norm()
    assert error <= limit, f"{name}: error {error:.3e}, dense float32 {bar:.3e}, limit {limit:.3e}"
    # One wrong element hides in a norm: the largest error, whose spread is half as wide again.
    error, bar = (got.double() - truth).abs().amax(), (plain.double() - truth).abs().amax()
    limit = 1.5 * times * bar + unit * truth.abs().amax()
    assert error <= limit, f"{name}: largest error {error:.3e}, dense float32 {bar:.3e}, limit {limit:.3e}"


def scaled(case: Case, factor: int) -> Case:
    """The case at a size for GPUs: sequences and the masks' lengths times ``factor``."""
    return replace(case, seq_len=case.seq_len * factor, mask=_scaled_mask(case.mask, factor))


def _scaled_mask(mask: Mask, n: int) -> Mask:
    match mask:
        case masks.And(a, b):
            return masks.And(_scaled_mask(a, n), _scaled_mask(b, n))
        case masks.Window(left, right):
            return masks.Window(left * n, right * n)
        case masks.Documents(cu_seqlens=ends):
            return masks.Documents([end * n for end in ends])
        case masks.PrefixLM(length):
            return masks.PrefixLM(length * n)
        case masks.Chunked(size):
            return masks.Chunked(size * n)
        case Blind(start, stop):
            return Blind(start * n, stop * n)
    return mask


def _poison(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full(like.shape, torch.nan, dtype=dtype or like.dtype, device=like.device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
