"""From tensors to launches: descriptors, grids and arguments of each kernel, with no decision left to the device.

The functions return launches rather than make them, so that the compile report can compile what a call would run.

[Note: shapes] as in `distflash.kernels.base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distflash.intervals import POSITION_TILE, Intervals
from distflash.kernels.base import BackwardContext, KeyGradient, Keys, QueryGradient, Scores
from distflash.kernels.launch import Launch, aligned, heads_at_once, is_aligned, is_packed, steps
from distflash.kernels.triton import backward as of_backward
from distflash.kernels.triton import common
from distflash.kernels.triton import dropout as of_dropout
from distflash.kernels.triton import forward as of_forward
from distflash.kernels.triton.backward import dkdv_kernel, dq_kernel, statistics_kernel
from distflash.kernels.triton.forward import forward_kernel
from distflash.kernels.triton.keys import settle
from distflash.kernels.triton.tiles import Tile, Tiles, choose
from distflash.liveness import GROUP_ROWS, all_rows
from distflash.partial import Partial
from distflash.plan import Pass

settle(common, of_dropout, of_forward, of_backward)

LOG2E = 1.4426950408889634
# Families whose hardware copies whole tiles given a descriptor. The interpreter does, as a test of the same path.
DESCRIPTORS = ("sm_90", "sm_100", "interpreter")


@dataclass(frozen=True)
class Device:
    """What the launches need to know of a device."""

    tiles: Tiles
    descriptors: bool


def device(
    family: str, itemsize: int, largest_dim: int, tiles: Tiles | None = None, has_dropout: bool = False
) -> Device:
    """A device of a family (see `tiles`) with the shipped tiles for elements and head dims of this size, or others."""
    # float32 products take operands from registers: tiles laid out for tensor cores would only make that harder.
    descriptors = family in DESCRIPTORS and itemsize == 2
    return Device(tiles or choose(family, itemsize, _padded(largest_dim), has_dropout), descriptors)


def forward(device: Device, q: Tensor, keys: Keys, each: Pass, scores: Scores, into: Partial) -> Launch:
    tile, k, v, rows = device.tiles.forward, keys.k, keys.v, keys.rows
    scale = scores.scale
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    sinks, running, maximum = scores.sinks, into.running, into.maximum
    # Tiles for tuning may be of any size: all rows are worked on in all passes then.
    live = each.live if GROUP_ROWS % tile.block_m == 0 else None
    count = q.shape[1] if live is None else live.count
    return Launch(
        kernel=forward_kernel,
        programs=triton.cdiv(count, tile.block_m) * q.shape[0] * q.shape[2],
        arguments=dict(
            **_inputs(device, tile, q=q, k=k, v=v),
            **_scores(tile, rows, scores, scale, into.lse),
            row_lo=rows.row_lo,
            row_hi=rows.row_hi,
            sinks=into.lse if sinks is None else sinks,
            SINKS=sinks is not None,
            MAXIMA=into.maxima is not None,
            lse=into.lse,
            final=_strided(into.final),
            maximum=into.lse if maximum is None else maximum,
            total=into.lse if running is None else running.total,
            weighted=_strided(into.lse if running is None else running.weighted),
            groups=rows.row_lo if live is None else live.groups,
            live=count,
            flags=all_rows(each.first, each.last, begun=False) if live is None else -1,
            heads_at_once=heads_at_once(k, v) * (q.shape[2] // k.shape[2]),
            **_sizes(tile, q, k, v),
        ),
    )


def statistics(saved: BackwardContext, out: Tensor, dlse: Tensor | None) -> Launch:
    """Fills in the statistics of `kernel.saved_of`."""
    B, T, H, V = out.shape
    dout, lse, stats = saved.dout, saved.lse, saved.lse_delta
    assert stats is not None
    block = 64
    strides = (0, 0, 0) if dlse is None else dlse.stride()
    return Launch(
        kernel=statistics_kernel,
        programs=triton.cdiv(T, block) * B * H,
        arguments=dict(
            out=_strided(out),
            dout=_strided(dout),
            lse=lse,
            dlse=lse if dlse is None else dlse,
            dlse_batch=strides[0],
            dlse_head=strides[1],
            dlse_row=strides[2],
            stats=stats,
            queries=T,
            padded=stats.shape[-1],
            heads=H,
            planes=B * H,
            V=V,
            VP=_padded(V),
            BLOCK_M=block,
            DLSE=dlse is not None,
        ),
    )


def backward_keys(device: Device, saved: BackwardContext, keys: Keys, scores: Scores, dkv: KeyGradient) -> Launch:
    tile, k, v, rows = device.tiles.dkdv, keys.k, keys.v, keys.rows
    q, dout, stats = saved.q, saved.dout, saved.lse_delta
    assert stats is not None
    group = q.shape[2] // k.shape[2]
    return Launch(
        kernel=dkdv_kernel,
        programs=triton.cdiv(k.shape[1], tile.block_n) * k.shape[0] * k.shape[2],
        arguments=dict(
            **_inputs(device, tile, q=q, k=k, v=v, dout=dout),
            **_scores(tile, rows, scores, scores.scale, stats),
            stats=_columns(stats, q.shape[1], tile.block_m) if device.descriptors else stats,
            col_lo=rows.col_lo,
            col_hi=rows.col_hi,
            dk=_strided(dkv.dk),
            dv=_strided(dkv.dv),
            heads_at_once=max(1, heads_at_once(q, dout) // group),
            **_sizes(tile, q, k, v),
        ),
    )


def backward_queries(
    device: Device, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient
) -> Launch:
    tile, k, v, rows = device.tiles.dq, keys.k, keys.v, keys.rows
    q, stats = saved.q, saved.lse_delta
    assert stats is not None
    return Launch(
        kernel=dq_kernel,
        programs=triton.cdiv(q.shape[1], tile.block_m) * q.shape[0] * q.shape[2],
        arguments=dict(
            **_inputs(device, tile, q=q, k=k, v=v, dout=saved.dout),
            **_scores(tile, rows, scores, scores.scale, stats),
            stats=stats,
            row_lo=rows.row_lo,
            row_hi=rows.row_hi,
            sum=_strided(stats if dq.sum is None else dq.sum),
            final=_strided(dq.final),
            first_hop=int(each.first),
            last_hop=int(each.last),
            heads_at_once=heads_at_once(k, v) * (q.shape[2] // k.shape[2]),
            **_sizes(tile, q, k, v),
        ),
    )


def _inputs(device: Device, tile: Tile, **tensors: Tensor) -> dict[str, Any]:
    """Each ``[B, rows, heads, dim]`` tensor as `load_rows` takes it, ``[B, heads, rows, dim]`` in blocks of rows."""
    block = {"q": tile.block_m, "dout": tile.block_m, "k": tile.block_n, "v": tile.block_n}
    inputs: dict[str, Any] = {"TMA": device.descriptors}
    for name, x in tensors.items():
        x = aligned(x, packed=not device.descriptors)
        inputs[name] = _descriptor(x, block[name]) if device.descriptors else _strided(x)
    return inputs


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    B, T, H, D = x.shape
    sb, st, sh, sd = x.stride()
    # The stride of a dimension of size 1 may be anything, and is checked all the same.
    sb, st, sh = (s if n > 1 else _padded(D) for s, n in ((sb, B), (st, T), (sh, H)))
    return TensorDescriptor(x, [B, H, T, D], [sb, sh, st, sd], [1, 1, block, _padded(D)])


def _columns(stats: Tensor, length: int, block: int) -> TensorDescriptor:
    """The statistics of ``length`` queries as `load_column` takes them."""
    two, planes, padded = stats.shape
    return TensorDescriptor(stats, [two, planes, length], [planes * padded, padded, 1], [1, 1, block])


def _strided(x: Tensor) -> tuple[Tensor, int, int]:
    """``[B, rows, heads, dim]`` as `at_rows` takes it: (pointer, head stride, row stride)."""
    if x.dim() == 3:  # a stand-in where there is nothing to read or write
        return (x, 0, 0)
    assert is_aligned(x) and is_packed(x), f"{tuple(x.shape)} at strides {x.stride()}: inputs are copied beforehand"
    _, row, head = steps(x)
    return (x, head, row)


def _scores(tile: Tile, rows: Intervals, scores: Scores, scale: float, nothing: Tensor) -> dict[str, Any]:
    slopes, dropout = scores.alibi_slopes, scores.dropout
    return dict(
        scale=scale,
        softcap=scores.softcap,
        SOFTCAP=scores.softcap > 0,
        slopes=nothing if slopes is None else slopes,
        ALIBI=slopes is not None,
        dropout=None if dropout is None else (dropout.seed, dropout.threshold, dropout.first_head),
        DROPOUT=dropout is not None,
        IN_TILES=dropout is not None and _is_in_tiles(tile, rows),
        q_positions=rows.q_positions,
        k_positions=rows.k_positions,
    )


def _is_in_tiles(tile: Tile, rows: Intervals) -> bool:
    """Whether each block of queries and of keys has consecutive positions from a multiple of 16 on."""
    blocks = tile.block_m, tile.block_n
    return rows.in_tiles and all(block % 16 == 0 and POSITION_TILE % block == 0 for block in blocks)


def _sizes(tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    B, T, H, D = q.shape
    _, K, G, V = v.shape
    return dict(
        queries=T,
        keys=K,
        heads=H,
        batches=B,
        GROUP=H // G,
        D=D,
        V=V,
        DP=_padded(D),
        VP=_padded(V),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,  # triton 3.10 turns it off where it is not asked for
    )


def _padded(dim: int) -> int:
    return triton.next_power_of_2(dim)
