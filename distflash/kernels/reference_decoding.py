"""Decoding in plain torch: the definition that the fast kernel is tested against, and the default on CPUs.

[Note: shapes] as in `distflash.kernels.decoding`; K the most keys that this rank keeps of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.cache_balance import storing_ranks
from distflash.kernels.base import Scores
from distflash.kernels.decoding import BEYOND, DIFFER, FULL, WORDS, Decoding, Store, Table
from distflash.partial import Softmax, accumulator_dtype

_FAR = 2**31 - 1


@dataclass(frozen=True)
class ReferenceDecoding(Decoding):
    """Plain torch, any device."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, rank: int) -> Tensor:
        B, n, H, _ = q.shape
        count = _keep(k, v, store, rank)
        ends = _local_ends(store, table, count, n)
        softmax = _softmax(q, store, ends, scores)
        message = q.new_empty(B, n * H * (v.shape[3] + 2) + WORDS, dtype=accumulator_dtype(q.dtype))
        weighted, maximum, total, words = _parts(message, n, H)
        weighted.copy_(softmax.weighted.transpose(1, 2))
        maximum.copy_(softmax.maximum.transpose(1, 2))
        total.copy_(softmax.total.transpose(1, 2))
        words.copy_(torch.stack([store.lengths.long(), _digest(store.counts), _digest(q), _digest(q[:, :0])], 1))
        return message

    def merge(self, messages: Tensor, q: Tensor, store: Store, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        B, n, H, _ = q.shape
        parts = [_parts(message, n, H) for message in messages]
        differ = torch.stack([(words != parts[0][3]).any() for *_, words in parts]).any()
        store.fault.copy_(torch.where((store.fault == 0) & differ, DIFFER, store.fault))
        maximum = parts[0][1].new_full((B, n, H), -torch.inf)
        softmax = Softmax(maximum, torch.zeros_like(maximum), torch.zeros_like(parts[0][0]))
        for weighted, most, total, _ in parts:
            softmax = softmax.merge(Softmax(most, total, weighted))
        if sinks is not None:
            sink = sinks.to(maximum.dtype).expand(B, n, H)
            softmax = softmax.merge(Softmax(sink, torch.ones_like(sink), torch.zeros_like(softmax.weighted)))
        out, lse = (x.masked_fill(store.fault != 0, torch.nan) for x in softmax.finish())
        sound = (store.fault == 0).int()
        kept = torch.zeros_like(store.counts).scatter_add_(1, storing_ranks(store.counts, n), sound.expand(B, n))
        store.counts.add_(kept)
        store.lengths.add_(n * sound)
        return out.to(q.dtype), lse


def _keep(k: Tensor, v: Tensor, store: Store, rank: int) -> Tensor:
    """Write this rank's new keys behind those that there are: int64 ``[B]``, how many it then has."""
    n = k.shape[1]
    mine = storing_ranks(store.counts, n) == rank
    slots = store.counts[:, rank, None] + mine.cumsum(1) - 1
    full = store.counts.sum(1) + n > store.room * store.world_size
    store.fault.copy_(torch.where((store.fault == 0) & full.any(), FULL, store.fault))
    b, t = (mine & ~full[:, None]).nonzero(as_tuple=True)
    store.k[b, slots[b, t]] = k[b, t]
    store.v[b, slots[b, t]] = v[b, t]
    store.positions[b, slots[b, t]] = store.lengths[b] + t.int()
    return (store.counts[:, rank] + mine.sum(1)).clamp_max(store.room)


def _local_ends(store: Store, table: Table, count: Tensor, n: int) -> Tensor:
    """int64 ``[B, 2, P, n]``: the ends among the keys that this rank keeps."""
    B, (_, _, P, N) = len(store.lengths), table.ends.shape
    positions = store.lengths[:, None] + torch.arange(n, device=count.device) - table.start
    beyond = ((positions < 0) | (positions >= N)).any()
    store.fault.copy_(torch.where((store.fault == 0) & beyond, BEYOND, store.fault))
    index = positions.long().clamp(0, N - 1)[:, None, None].expand(B, 2, P, n)
    ends = table.ends.expand(B, 2, P, N).gather(3, index)
    slots = torch.arange(store.room, device=count.device)
    kept = store.positions.masked_fill(slots >= count[:, None], _FAR)
    return torch.searchsorted(kept, ends.flatten(1).contiguous()).view(B, 2, P, n)


def _softmax(q: Tensor, store: Store, ends: Tensor, scores: Scores) -> Softmax:
    """Over the keys that this rank keeps: ``maximum, total [B, H, n]``, ``weighted [B, H, n, V]``."""
    _, n, H, _ = q.shape
    dtype, G = accumulator_dtype(q.dtype), store.k.shape[2]
    K = int(ends.max()) if ends.numel() else 0
    k, v = (x[:, :K].transpose(1, 2).to(dtype) for x in (store.k, store.v))
    queries = q.transpose(1, 2).to(dtype).unflatten(1, (G, H // G)) * scores.scale
    s = queries @ k[:, :, None].mT
    if scores.softcap:
        s = torch.tanh(s / scores.softcap) * scores.softcap
    if scores.alibi_slopes is not None:
        mine = store.lengths[:, None] + torch.arange(n, device=q.device)
        distance = (mine[:, :, None] - store.positions[:, None, :K]).abs().to(dtype)
        s = s - scores.alibi_slopes.to(dtype).view(G, -1, 1, 1) * distance[:, None, None]
    key = torch.arange(K, device=q.device)
    lo, hi = ends[:, 0, ..., None], ends[:, 1, ..., None]
    seen = ((key >= lo) & (key < hi)).any(1)
    s = s.masked_fill(~seen[:, None, None], -torch.inf)
    if not K:
        maximum = s.new_full(s.shape[:-1], -torch.inf)
        nothing = Softmax(maximum, torch.zeros_like(maximum), s.new_zeros(*s.shape[:-1], v.shape[3]))
        return Softmax(*(x.flatten(1, 2) for x in nothing.tensors))
    # What no query of a sequence sees may be anything, also what times 0 is not 0.
    v = v.masked_fill(~seen.any(1)[:, None, :, None], 0.0)
    softmax = Softmax.of_scores(s, v[:, :, None])
    return Softmax(*(x.flatten(1, 2) for x in softmax.tensors))


def _parts(message: Tensor, n: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a message: ``weighted [B, n, H, V]``, ``maximum, total [B, n, H]``, words ``[B, 4]`` of integers."""
    rows = n * heads
    width = (message.shape[1] - WORDS - 2 * rows) // rows if rows else 0
    weighted, maximum, total, words = message.split([rows * width, rows, rows, WORDS], 1)
    shape = (len(message), n, heads)
    integers = torch.int64 if message.dtype == torch.float64 else torch.int32
    return weighted.view(*shape, width), maximum.view(shape), total.view(shape), words.view(integers)


def _digest(x: Tensor) -> Tensor:
    """int64 ``[B]`` below 2**31: of the bits of each sequence."""
    B = len(x)
    integers = torch.int16 if x.element_size() == 2 else torch.int32
    bits = x.contiguous().view(B, -1).view(integers).long()
    factors = (torch.arange(bits.shape[1], device=x.device) * 2 + 1) * 0x9E3779B1
    return ((bits * factors).sum(1) >> 16) & _FAR
