"""From tensors to launches of the Hopper kernels, with no decision left to the device.

[Note: shapes] as in `distflash.kernels.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from distflash.dropout import Dropout
from distflash.intervals import POSITION_TILE, Intervals
from distflash.kernels.base import BackwardContext, KeyGradient, Keys, Scores
from distflash.kernels.hopper import backward as of_backward
from distflash.kernels.hopper import (
    backward_parts,
    backward_wide,
    common,
    compat,
    forward_loads,
    forward_state,
    fragments,
    ordered,
)
from distflash.kernels.hopper import dropout as of_dropout
from distflash.kernels.hopper import forward as of_forward
from distflash.kernels.hopper.backward import backward_kernel
from distflash.kernels.hopper.backward_wide import backward_wide_kernel
from distflash.kernels.hopper.forward import forward_kernel
from distflash.kernels.hopper.fragments import round_kernel
from distflash.kernels.hopper.sums import in_fragments
from distflash.kernels.hopper.tiles import KEYS, QUERIES, BackwardTile, ForwardTile, padded
from distflash.kernels.launch import Launch, aligned, heads_at_once
from distflash.kernels.triton.keys import settle
from distflash.liveness import GROUP_ROWS, all_rows
from distflash.partial import Partial
from distflash.plan import Pass

settle(
    common,
    compat,
    fragments,
    ordered,
    of_dropout,
    forward_loads,
    forward_state,
    of_forward,
    backward_parts,
    of_backward,
    backward_wide,
)

ROWS = 64  # of one warpgroup's matrix instruction


def forward(
    tile: ForwardTile, programs: int, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial
) -> Launch:
    """A pass over the keys of one source or of two; heads below ``each.begun`` take the second source's only."""
    scale = scores.scale
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    B, T, H, D = q.shape
    (first, *rest), (G, V) = keys, keys[0].v.shape[2:]
    group = H // G
    heads = H if each.heads is None else each.heads.stop * group
    assert len(rest) < 2 and (each.heads is None or each.heads.start == 0), "heads are counted from the first"
    sinks, running, maximum = scores.sinks, into.running, into.maximum
    live, count = each.live, T if each.live is None else each.live.count
    block = tile.consumers * ROWS
    assert GROUP_ROWS % block == 0
    blocks = triton.cdiv(count, block)
    programs = min(programs, blocks * B * heads)
    source = _source(first, tile.block_n)
    second = _source(rest[0], tile.block_n) if rest else source
    return Launch(
        kernel=forward_kernel,
        programs=programs,
        arguments=dict(
            q=_descriptor(q, ROWS, padded(D)),
            **dict(zip(("k", "v", "row_lo", "row_hi"), source, strict=True)),
            **dict(zip(("other_k", "other_v", "other_lo", "other_hi"), second, strict=True)),
            sinks=into.lse if sinks is None else sinks,
            final=_descriptor(into.final, ROWS, padded(V)),
            lse=into.lse,
            maximum=into.lse if maximum is None else maximum,
            total=into.lse if running is None else running.total,
            weighted=into.lse if running is None else running.weighted,
            counter=into.counter,
            scale=scale,
            softcap=scores.softcap,
            queries=T,
            heads=H,
            batches=B,
            head_count=heads,
            begun_heads=each.begun * group,
            groups=first.rows.row_lo if live is None else live.groups,
            blocks=blocks,
            flags=all_rows(each.first, each.last, each.begun > 0) if live is None else -1,
            heads_at_once=group * _neighbours(blocks * group, programs, first.k, first.v),
            programs=programs,
            **_dropout(scores.dropout, [x.rows for x in keys], first.rows.row_lo, tile.block_n),
            keys=first.k.shape[1],
            other_keys=keys[-1].k.shape[1],
            GROUP=group,
            D=D,
            V=V,
            **_of_tile(tile),
            SOFTCAP=scores.softcap > 0,
            SINKS=sinks is not None,
            TWO=bool(rest),
            MAXIMA=into.maxima is not None,
            num_warps=4,
        ),
    )


def backward(
    tile: BackwardTile,
    programs: int,
    saved: BackwardContext,
    keys: Keys,
    scores: Scores,
    dkv: KeyGradient,
    heads: range,
    earlier: Tensor | None = None,
) -> Launch:
    """Of these key heads; adds to ``saved.dq_accum``. If ``tile.ordered``, earlier: see `Turns`."""
    q, stats = saved.q, saved.lse_delta
    k, v, rows = keys.k, keys.v, keys.rows
    assert stats is not None and saved.dq_accum is not None
    sums = in_fragments(saved.dq_accum, q)
    B, T, H, D = q.shape
    _, K, G, V = v.shape
    blocks, wide = triton.cdiv(K, ROWS if tile.by_columns else KEYS), dkv.dk.dtype != q.dtype
    programs = min(programs, blocks * B * len(heads))
    as_they_are = wide or tile.by_columns
    dropped = _dropout(scores.dropout, [rows], rows.col_lo)
    del dropped["other_k_positions"]
    choices: dict[str, Any] = {}
    if not tile.by_columns:
        semaphores = saved.semaphores if tile.ordered else None
        choices = dict(semaphores=semaphores, earlier=earlier, WIDE=wide, DIRECT=tile.direct)
        choices |= dict(ORDERED=tile.ordered)
    return Launch(
        kernel=backward_wide_kernel if tile.by_columns else backward_kernel,
        programs=programs,
        arguments=dict(
            q=_descriptor(q, QUERIES, padded(D)),
            k=_descriptor(k, ROWS, padded(D)),
            v=_descriptor(v, ROWS, padded(V)),
            dout=_descriptor(saved.dout, QUERIES, padded(V)),
            stats=_columns(stats, T, QUERIES),
            col_lo=rows.col_lo,
            col_hi=rows.col_hi,
            dq=sums if tile.direct else _rows(sums.flatten(0, 2)),
            dk=dkv.dk if as_they_are else _descriptor(dkv.dk, ROWS, padded(D)),
            dv=dkv.dv if as_they_are else _descriptor(dkv.dv, ROWS, padded(V)),
            counter=saved.counter,
            scale=scores.scale,
            softcap=scores.softcap,
            queries=T,
            keys=K,
            kv_heads=G,
            first_head=heads.start,
            head_count=len(heads),
            batches=B,
            heads_at_once=_neighbours(blocks, programs, *[q, saved.dout] * (H // G)),
            programs=programs,
            GROUP=H // G,
            D=D,
            V=V,
            BLOCK_M=QUERIES,
            STAGES=tile.stages,
            REGISTERS=tile.registers,
            IN_REGISTERS=tile.in_registers,
            SOFTCAP=scores.softcap > 0,
            **dropped,
            **choices,
            num_warps=4,
        ),
    )


def round_queries(sums: Tensor, scale: float, out: Tensor) -> Launch:
    """``out [B, T, H, D] = sums * scale``, of the memory of `sums.query_sums`."""
    _, T, H, D = out.shape
    sums = in_fragments(sums, out)
    tiles, parts, _, columns = sums.shape
    assert out.is_contiguous()
    return Launch(
        kernel=round_kernel,
        programs=tiles,
        arguments=dict(sums=sums, out=out, scale=scale, queries=T, heads=H, D=D, N=columns, PARTS=parts, num_warps=4),
    )


def _source(keys: Keys, rows: int) -> tuple[Any, Any, Tensor, Tensor]:
    """Keys and values in tiles of so many rows, and the ends of the intervals."""
    k, v = (_descriptor(x, rows, padded(x.shape[3])) for x in (keys.k, keys.v))
    return k, v, keys.rows.row_lo, keys.rows.row_hi


def _of_tile(tile: ForwardTile) -> dict[str, Any]:
    return dict(
        BLOCK_N=tile.block_n,
        CONSUMERS=tile.consumers,
        STAGES=tile.stages,
        REGISTERS=tile.registers,
        SLOTS=tile.slots,
        IN_TURN=tile.in_turn,
        HALVES=tile.halves,
    )


def _dropout(
    dropout: Dropout | None, rows: Sequence[Intervals], nothing: Tensor, columns: int = QUERIES
) -> dict[str, Any]:
    """The seed, the numbers and the positions of a pass over one source or two; or stand-ins. columns: of a product."""
    positions = rows[0].q_positions, rows[0].k_positions, rows[-1].k_positions
    names = "q_positions", "k_positions", "other_k_positions"
    if dropout is None:
        absent = dict.fromkeys(("seed", *names), nothing)
        return absent | dict(heads_before=0, threshold=0, keep_scale=1.0, DROPOUT=0)
    in_tiles = POSITION_TILE % columns == 0 and all(x.in_tiles for x in rows)
    return dict(
        **dict(zip(names, positions, strict=True)),
        seed=dropout.seed,
        heads_before=dropout.first_head,
        threshold=dropout.threshold,
        keep_scale=dropout.keep_scale,
        DROPOUT=of_dropout.IN_TILES.value if in_tiles else of_dropout.ANYWHERE.value,
    )


def _neighbours(blocks: int, programs: int, *shared: Tensor) -> int:
    """How many key heads of so many blocks each to work on at a time: a power of two that fits into the L2 cache.

    Programs side by side that read the same tiles at about the same time have them read from the cache once, so few are
    best; but enough to keep all programs busy, and long blocks from being begun last.
    """
    wanted = min(triton.cdiv(programs, max(1, blocks)), heads_at_once(*shared))
    return 1 << max(0, wanted.bit_length() - 1)


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """Tiles of rows of one head of ``[B, rows, heads, dim]``; beyond it, zeros are read and nothing is written."""
    x = aligned(x, packed=False)
    B, T, H, D = x.shape
    sb, st, sh, sd = x.stride()
    # The stride of a dimension of size 1 may be anything, and is checked all the same.
    sb, st, sh = (s if n > 1 else columns for s, n in ((sb, B), (st, T), (sh, H)))
    block = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=4)
    return TensorDescriptor(x, [B, H, T, D], [sb, sh, st, sd], block, layout)


def _rows(sums: Tensor) -> Any:
    """ROWS of ``[rows, columns]`` at a time, one after the other."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(sums, list(sums.shape), list(sums.stride()), [ROWS, sums.shape[1]], layout)


def _columns(stats: Tensor, length: int, block: int) -> Any:
    """The statistics ``[2, B * H, T']`` of ``length`` queries, a tile of one of them at a time."""
    two, planes, stride = stats.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    return TensorDescriptor(stats, [two, planes, length], [planes * stride, stride, 1], [1, 1, block], layout)
