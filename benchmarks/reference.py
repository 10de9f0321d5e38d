"""A float64 reference for sampled rows and columns of attention and its gradients.

Sampled queries need all keys; their out, dq and lse are recomputed. Sampled keys need all queries, with the lse of
their rows; there the lse under test is used, which is checked at the sampled queries before.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D and V head dims, n samples
per rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import distflash as df
from distflash.dropout import in_steps

# Largest relative (Frobenius) error, several times that of rounding. A wrong mask, a missing ring step or swapped heads
# give 0.1 or more.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class Dropped:
    """Dropout of a call to `distflash.attention`: its rate and its seed."""

    p: float
    seed: int

    def factors(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> list[Tensor | float]:
        """For each head of ``q``, what probabilities ``[B, queries, keys]`` are multiplied by."""
        B, _, H, _ = q.shape
        if not self.p:
            return [1.0] * H
        kept = df.dropout_mask(self.seed, self.p, B, H, q_positions, k_positions)
        return list((kept.double() / (1 - in_steps(self.p))).unbind(1))


NOTHING = Dropped(0.0, 0)


@dataclass(frozen=True)
class Reference:
    """The float64 values at this rank's sampled tokens: out and dq as queries, dk and dv as keys."""

    tokens: Tensor
    values: dict[str, Tensor]
    cp: df.ContextParallel

    def errors(self, **results: Tensor) -> dict[str, float]:
        """Relative errors of the given ``out, dq, dk, dv [B, T, ...]``, over the samples of all ranks."""
        names = sorted(results)
        squares = []
        for name in names:
            difference = results[name].detach()[:, self.tokens].double() - self.values[name]
            squares += [difference.square().sum(), self.values[name].square().sum()]
        total = self.cp.transport.all_reduce(torch.stack(squares)).view(-1, 2)
        return {name: float((wrong / right) ** 0.5) for name, (wrong, right) in zip(names, total.tolist(), strict=True)}


def wrong(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether any error exceeds TOLERANCE or is NaN."""
    return not all(error <= TOLERANCE[dtype] for error in errors.values())


@torch.no_grad()
def sample(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: df.Mask,
    cp: df.ContextParallel,
    seq_len: int,
    count: int = 48,
    dropout: Dropped = NOTHING,
) -> Reference:
    """Compute the reference at ``count`` tokens of each rank. All ranks must call.

    Args:
        q, k, v, dout: this rank's inputs.
        out, lse: a result for them, ``[B, T, H, V]`` and ``[B, H, T]``; lse is checked here.
        dropout: of the call.

    Raises:
        AssertionError: lse is wrong.
    """
    tokens = _tokens(q.shape[1], count).to(q.device)
    positions = cp.positions(seq_len, q.device)
    out_rows, dq, lse_rows = _rows(q, cp.unshard(k), cp.unshard(v), dout, tokens, mask, positions, seq_len, dropout)
    seen = lse_rows > -torch.inf
    difference = (lse[:, :, tokens].double() - lse_rows)[seen].abs().max().item() if seen.any() else 0.0
    assert difference < 1e-2 and torch.equal(lse[:, :, tokens] > -torch.inf, seen), f"lse is off by {difference}"
    dk, dv = _columns(q, k, v, dout, out, lse, tokens, mask, positions, seq_len, cp, dropout)
    return Reference(tokens, {"out": out_rows, "dq": dq, "dk": dk, "dv": dv}, cp)


def _tokens(length: int, count: int) -> Tensor:
    """Sampled local indices: both ends, the middle (where chunks of a layout meet), and random ones."""
    seams = [start + n for start in (0, length // 2 - 4, length - 4) for n in range(4)]
    rest = torch.randint(length, (max(count - len(seams), 0),), generator=torch.Generator().manual_seed(length))
    return torch.cat([torch.tensor(seams).clamp(0, length - 1), rest])


def _heads(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    """Pairs of a query head and its key head."""
    group = q.shape[2] // k.shape[2]
    return ((h, h // group) for h in range(q.shape[2]))


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    tokens: Tensor,
    mask: df.Mask,
    positions: Tensor,
    seq_len: int,
    dropout: Dropped,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out [B, n, H, V], dq [B, n, H, D], lse [B, H, n]`` of the sampled queries, over ``k, v [B, S, ...]``."""
    scale = q.shape[-1] ** -0.5
    keys = torch.arange(seq_len, device=q.device)
    visible, factors = mask.materialize(positions[tokens], keys, seq_len), dropout.factors(q, positions[tokens], keys)
    outs, dqs, lses = [], [], []
    for h, g in _heads(q, k):
        q_h, dout_h = q[:, tokens, h].double(), dout[:, tokens, h].double()
        k_g, v_g = k[:, :, g].double(), v[:, :, g].double()
        s = (q_h @ k_g.mT * scale).masked_fill_(~visible, -torch.inf)
        lse = torch.logsumexp(s, -1)
        p = s.sub_(lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp_()
        out = p * factors[h] @ v_g
        ds = p * (dout_h @ v_g.mT * factors[h] - (dout_h * out).sum(-1, keepdim=True))
        outs.append(out)
        dqs.append(ds @ k_g * scale)
        lses.append(lse)
    return torch.stack(outs, 2), torch.stack(dqs, 2), torch.stack(lses, 1)


def _columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    tokens: Tensor,
    mask: df.Mask,
    positions: Tensor,
    seq_len: int,
    cp: df.ContextParallel,
    dropout: Dropped,
) -> tuple[Tensor, Tensor]:
    """``dk [B, n, G, D], dv [B, n, G, V]`` of the sampled keys, summed over all ranks' queries."""
    scale = q.shape[-1] ** -0.5
    gather = cp.transport.all_gather
    k_cols, v_cols = (torch.cat(gather(x[:, tokens].contiguous()), 1).double() for x in (k, v))
    keys = torch.cat(gather(positions[tokens]))
    visible, factors = mask.materialize(positions, keys, seq_len), dropout.factors(q, positions, keys)
    dk, dv = torch.zeros_like(k_cols), torch.zeros_like(v_cols)
    for h, g in _heads(q, k):
        q_h, dout_h = q[:, :, h].double(), dout[:, :, h].double()
        delta = (dout_h * out[:, :, h].double()).sum(-1, keepdim=True)
        lse_h = lse[:, h, :, None].double()
        s = (q_h @ k_cols[:, :, g].mT * scale).masked_fill_(~visible, -torch.inf)
        p = s.sub_(lse_h.masked_fill(lse_h == -torch.inf, 0.0)).exp_()
        ds = p * (dout_h @ v_cols[:, :, g].mT * factors[h] - delta)
        dk[:, :, g] += ds.mT @ q_h * scale
        dv[:, :, g] += (p * factors[h]).mT @ dout_h
    n = len(tokens)
    mine = slice(cp.rank * n, (cp.rank + 1) * n)
    return cp.transport.all_reduce(dk)[:, mine], cp.transport.all_reduce(dv)[:, mine]
