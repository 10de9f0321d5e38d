"""Layers with independent heads: each rank runs the whole sequence for its share of the heads, as in Ulysses.

Projections and the gate's norm are computed for local tokens. An all-to-all brings each rank the projected columns of
its heads for all tokens. A copy of the layer with only these heads runs on them. A second all-to-all returns the
results.

[Note: shapes] B batch, T local tokens, S global tokens, W ranks, P projected columns, V result columns of all heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distflash import collectives
from distflash.context import ContextParallel
from distflash.integrations.transformers.batch import Shard


class Share(NamedTuple):
    """A rank's heads. columns, channels: int64, indices of projected columns and of channels of the convolution."""

    columns: Tensor
    channels: Tensor
    sizes: dict[str, Any]


class Kind(ABC):
    """Layers of one kind: ``out_proj(norm(scan(conv1d(projected)), gate))``."""

    @abstractmethod
    def share(self, layer: Any, world_size: int, rank: int) -> Share | None:
        """The share of a rank; None if the number of ranks does not divide the heads."""

    @abstractmethod
    def project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the scan ``[B, T, P]``, and the gate, from ``hidden [B, T, ...]``."""

    @abstractmethod
    def finish(self, layer: Any, scanned: Tensor, gate: Tensor) -> Tensor:
        """The layer's output, from the scan's ``[B, T, V]``."""


def copy_with(layer: nn.Module, **parts: Any) -> Any:
    """A shallow copy of ``layer`` with these attributes replaced."""
    copied = copy(layer)
    for kind in ("_parameters", "_modules", "_buffers"):
        vars(copied)[kind] = {name: x for name, x in vars(layer)[kind].items() if name not in parts}
    vars(copied).pop("forward", None)
    vars(copied).update(parts)
    return copied


@dataclass(frozen=True)
class Mamba2(Kind):
    """Mamba-2: one projection [gate | x | B | C | dt], B and C by groups of heads."""

    def share(self, layer: Any, world_size: int, rank: int) -> Share | None:
        heads, groups, width, state = layer.num_heads, layer.n_groups, layer.head_dim, layer.ssm_state_size
        n, per_group = heads // world_size, heads // groups
        if heads % world_size or (n % per_group and per_group % n) or layer.intermediate_size != heads * width:
            return None
        own = range(rank * n, (rank + 1) * n)
        count = max(1, n // per_group)
        first = own.start // per_group
        inner = layer.intermediate_size
        x = torch.arange(own.start * width, own.stop * width)
        b = inner + torch.arange(first * state, (first + count) * state)
        channels = torch.cat([x, b, b + groups * state])
        dt = inner + layer.conv_dim + torch.arange(own.start, own.stop)
        sizes = {
            "num_heads": n,
            "n_groups": count,
            "intermediate_size": n * width,
            "conv_dim": len(channels),
            "in_proj": lambda x: F.pad(x, (n * width, 0)),  # no gate
            **{name: getattr(layer, name)[own.start : own.stop] for name in ("A_log", "D", "dt_bias")},
        }
        return Share(torch.cat([inner + channels, dt]), channels, sizes)

    def project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        projected = layer.in_proj(hidden)
        return projected, projected[..., : layer.intermediate_size]

    def finish(self, layer: Any, scanned: Tensor, gate: Tensor) -> Tensor:
        return layer.out_proj(layer.norm(scanned, gate).to(scanned.dtype))


class GatedDelta(Kind):
    """Gated delta nets: key heads, each with its value heads; a norm of each value head."""

    def share(self, layer: Any, world_size: int, rank: int) -> Share | None:
        if layer.num_k_heads % world_size:
            return None
        n, values = layer.num_k_heads // world_size, layer.num_v_heads // world_size
        keys, wide = n * layer.head_k_dim, values * layer.head_v_dim
        q = torch.arange(rank * keys, (rank + 1) * keys)
        v = 2 * layer.key_dim + torch.arange(rank * wide, (rank + 1) * wide)
        channels = torch.cat([q, layer.key_dim + q, v])
        own = slice(rank * values, (rank + 1) * values)
        sizes = {
            **{"num_k_heads": n, "num_v_heads": values, "key_dim": keys, "value_dim": wide, "conv_dim": len(channels)},
            **{name: getattr(layer, name)[own] for name in ("A_log", "dt_bias")},
            **self.projections(layer, len(channels), n, values),
        }
        return Share(self.columns(layer, channels, world_size, rank), channels, sizes)

    @abstractmethod
    def columns(self, layer: Any, channels: Tensor, world_size: int, rank: int) -> Tensor:
        """Which projected columns a rank's heads read."""

    @abstractmethod
    def projections(self, layer: Any, channels: int, keys: int, values: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """Replacements of the layer's projections, which slice the columns. keys, values: numbers of heads."""

    def finish(self, layer: Any, scanned: Tensor, gate: Tensor) -> Tensor:
        heads = scanned.unflatten(-1, (-1, layer.head_v_dim))
        normed = layer.norm(heads.flatten(0, -2), gate.reshape(-1, layer.head_v_dim))
        return layer.out_proj(normed.reshape(scanned.shape))


@dataclass(frozen=True)
class Qwen35(GatedDelta):
    """Four projections: [q | k | v], z, b and a."""

    def columns(self, layer: Any, channels: Tensor, world_size: int, rank: int) -> Tensor:
        n = layer.num_v_heads // world_size
        b = layer.conv_dim + torch.arange(rank * n, (rank + 1) * n)
        return torch.cat([channels, b, layer.num_v_heads + b])

    def projections(self, layer: Any, channels: int, keys: int, values: int) -> dict[str, Callable[[Tensor], Tensor]]:
        width = values * layer.head_v_dim
        return {
            "in_proj_qkv": lambda x: x[..., :channels],
            "in_proj_z": lambda x: x.new_zeros(1).expand(*x.shape[:-1], width),
            "in_proj_b": lambda x: x[..., channels : channels + values],
            "in_proj_a": lambda x: x[..., channels + values :],
        }

    def project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        read = [project(hidden) for project in (layer.in_proj_qkv, layer.in_proj_b, layer.in_proj_a)]
        return torch.cat(read, -1), layer.in_proj_z(hidden)


@dataclass(frozen=True)
class Qwen3Next(GatedDelta):
    """Two projections, of each key head in turn: [q | k | its values | their z], and [b | a]."""

    def columns(self, layer: Any, channels: Tensor, world_size: int, rank: int) -> Tensor:
        heads, width = layer.num_k_heads, 2 * (layer.key_dim + layer.value_dim)
        of_z = layer.value_dim // heads
        columns = torch.arange(width).view(heads, -1)[:, :-of_z]
        gates = width + torch.arange(2 * layer.num_v_heads).view(heads, -1)
        n = heads // world_size
        own = slice(rank * n, (rank + 1) * n)
        return torch.cat([columns[own].flatten(), gates[own].flatten()])

    def projections(self, layer: Any, channels: int, keys: int, values: int) -> dict[str, Callable[[Tensor], Tensor]]:
        z = values // keys * layer.head_v_dim
        return {
            "in_proj_qkvz": lambda x: F.pad(x[..., :channels].unflatten(-1, (keys, -1)), (0, z)).flatten(-2),
            "in_proj_ba": lambda x: x[..., channels:],
        }

    def project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        qkvz, ba = layer.in_proj_qkvz(hidden), layer.in_proj_ba(hidden)
        return torch.cat([qkvz, ba], -1), layer.fix_query_key_value_ordering(qkvz, ba)[3]


KINDS: dict[str, Kind] = {
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer"), Mamba2()),
    **dict.fromkeys(("NemotronHMamba2Mixer", "Zamba2MambaMixer"), Mamba2()),
    **dict.fromkeys(("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"), Qwen35()),
    "Qwen3NextGatedDeltaNet": Qwen3Next(),
}


def kind_of(layer: nn.Module, world_size: int) -> Kind | None:
    """How to split a layer's heads over ``world_size`` ranks; None if that is not possible."""
    kind = KINDS.get(type(layer).__name__)
    return kind if kind is not None and kind.share(layer, world_size, 0) is not None else None


def run_split(layer: Any, kind: Kind, hidden: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
    """The output of a layer ``[B, T, ...]`` for local hidden states ``[B, T, ...]``. All ranks must call."""
    projected, gate = kind.project(layer, hidden)
    shares = [kind.share(layer, cp.world_size, rank) for rank in range(cp.world_size)]
    assert all(share is not None for share in shares)
    columns = torch.stack([share.columns for share in shares if share is not None]).to(hidden.device)
    sent = projected[..., columns.flatten()].unflatten(-1, columns.shape)
    own = shares[cp.rank]
    assert own is not None
    narrow = copy_with(layer, **own.sizes, **_rest(layer, own.channels.to(hidden.device)))
    whole = _ToHeads.apply(sent.movedim(-2, 0), shard, cp)
    parts = [narrow.forward(whole[:, a:b]) for a, b in _all_documents(shard)]
    scanned = _ToTokens.apply(torch.cat(parts, 1), shard, cp)
    return kind.finish(layer, scanned.movedim(0, -2).flatten(-2), gate)


def _rest(layer: Any, channels: Tensor) -> dict[str, Any]:
    """Other attributes of a share's copy."""
    bias = layer.conv1d.bias
    return {
        "conv1d": SimpleNamespace(weight=layer.conv1d.weight[channels], bias=None if bias is None else bias[channels]),
        "norm": lambda scanned, gate: scanned,
        "out_proj": nn.Identity(),
        "training": False,  # training kernels fuse the norm and the last projection
    }


def _all_documents(shard: Shard) -> list[tuple[int, int]]:
    ends = (0, shard.seq_len) if shard.documents is None else shard.documents.cu_seqlens
    return list(pairwise(ends))


class _ToHeads(torch.autograd.Function):
    """All-to-all from ``[W, B, T, P]``, local tokens of all shares, to ``[B, S, P]``, all tokens of the own share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
        ctx.how = shard, cp
        _require("heads", x[0], shard, cp)
        counts = [len(_positions(shard, rank)) for rank in range(cp.world_size)]
        parts = collectives.exchange(list(x), counts, 1, cp.transport, "columns of heads")
        parts[cp.rank] = x[cp.rank]
        order = torch.cat([_positions(shard, rank) for rank in range(cp.world_size)]).argsort()
        return torch.cat(parts, 1).index_select(1, order.to(x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _ToTokens.apply(grad, *ctx.how), None, None


class _ToTokens(torch.autograd.Function):
    """The inverse of `_ToHeads`. Each is the other's backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, cp: ContextParallel) -> Tensor:
        ctx.how = shard, cp
        _require("tokens", x, shard, cp)
        sent = [x.index_select(1, _positions(shard, rank).to(x.device)) for rank in range(cp.world_size)]
        parts = collectives.exchange(sent, [shard.seq_local] * cp.world_size, 1, cp.transport, "results of heads")
        parts[cp.rank] = sent[cp.rank]
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _ToHeads.apply(grad, *ctx.how), None, None


def _require(to: str, x: Tensor, shard: Shard, cp: ContextParallel) -> None:
    """Compare the all-to-all over the ranks."""
    fields = {**collectives.equal_fields(x, 1), "seq_len": shard.seq_len}
    cp.agreement.require(f"all-to-all to {to}", lambda: fields, key=(to, *fields.values()))


def _positions(shard: Shard, rank: int) -> Tensor:
    return shard.layout.positions(shard.seq_len, shard.world_size, rank)
