"""Pictures of masks: queries down, keys across, coloured by the rank that holds the query.

Long sequences are drawn as a grid of at most `CELLS` x `CELLS` cells, each as dark as the fraction of its pairs that
the mask allows. The fractions are exact, and no ``[S, S]`` tensor is made: see `count_pairs`.

matplotlib is optional, and is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distflash.extras import needed
from distflash.integers import as_int

# The most cells a side. More than the pixels of most pictures.
CELLS = 512

COLORS = ("#3b6fb6", "#e08a1e", "#4a9c5d", "#b5484f", "#7a5fa8", "#3fa7a3", "#c76a9f", "#8a7a4f")
BACKGROUND = "#f4f4f2"
# How dark a cell is whose fraction is just above 0: one allowed pair of a long sequence must not vanish.
_PALEST = 0.35
# Legend entries in a column.
_ENTRIES = 16


class Masked(Protocol):
    """A `Mask`, as far as a picture needs it."""

    @property
    def seq_len(self) -> int | None: ...

    def parts(self, positions: Tensor, seq_len: int) -> tuple[tuple[Tensor, Tensor], ...]: ...


class Placed(Protocol):
    """A `Layout`, as far as a picture needs it."""

    def positions(self, seq_len: int, world_size: int, rank: int) -> Tensor: ...


def plot(mask: Masked, seq_len: int | None, layout: Placed | None, world_size: int, ax: Any) -> Any:
    """See `Mask.plot`."""
    S = _length(mask, seq_len)
    held = _held(layout, S, world_size)
    _require_matplotlib()
    ax, edges = _new_axes(len(held)) if ax is None else ax, _edges(S)
    *colors, background = map(_as_rgb, (*_colors(len(held)), BACKGROUND))
    counts, paint = _painted(mask, S, held, edges, colors)
    image = torch.lerp(background, paint, _darkness(counts, edges)[..., None])
    ax.imshow(image.numpy(), extent=(0, S, S, 0), aspect="equal")
    ax.set_xlim(0, S), ax.set_ylim(S, 0)
    if len(held) > 1:
        _draw_holders(ax, held, edges, torch.stack(colors))
        _draw_legend(ax, colors, _shares(mask, S, held))
    _label(ax, f"key position\n{int(counts.sum()):,} pairs, {int(counts.sum()) / S**2:.2%} of all", "query position")
    text = repr(mask)
    ax.set_title(text if len(text) <= 80 else text[:60] + " ... " + text[-15:], fontsize=9, loc="left")
    return ax


def count_pairs(mask: Masked, seq_len: int, positions: Tensor, edges: Tensor) -> Tensor:
    """The allowed pairs of some queries, by cells of the picture, in ``O(T + cells^2)`` time and memory.

    Args:
        mask: what is counted.
        seq_len: the global length S.
        positions: int64 ``[T]``, ascending global positions of the queries.
        edges: int64 ``[n + 1]``, where the n cells of a side begin and end, from 0 to S.

    Returns:
        int64 ``[n, n]``, exact: queries down, keys across.
    """
    row = torch.searchsorted(edges, positions, right=True) - 1
    below = torch.zeros(len(edges) - 1, len(edges), dtype=torch.int64)
    for lo, hi in mask.parts(positions, seq_len):
        lo, hi = lo.clamp(0, seq_len), hi.clamp(0, seq_len)
        below += _count_below(row, torch.maximum(lo, hi), edges) - _count_below(row, lo, edges)
    return below.diff(dim=1)


def _count_below(row: Tensor, ends: Tensor, edges: Tensor) -> Tensor:
    """int64 ``[n, n + 1]``: over the queries of a row of cells, the sum of ``min(end, edge)``, for every edge.

    That is how many pairs there are with keys below both, if each query sees the keys ``[0, end)``. The queries whose
    end is at most the edge add their ends, the others the edge.
    """
    shape = len(edges) - 1, len(edges)
    at = row * shape[1] + torch.searchsorted(edges, ends)
    sums, counts = (torch.zeros(shape, dtype=torch.int64).flatten() for _ in range(2))
    sums, counts = sums.index_add_(0, at, ends), counts.index_add_(0, at, torch.ones_like(ends))
    sums, counts = (x.view(shape).cumsum(1) for x in (sums, counts))
    return sums + (counts[:, -1:] - counts) * edges


def _painted(
    mask: Masked, S: int, held: Sequence[Tensor], edges: Tensor, colors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The pairs of each cell, int64 ``[n, n]``, and the mean colour of their ranks, ``[n, n, 3]``."""
    n = len(edges) - 1
    total, paint = torch.zeros(n, n, dtype=torch.int64), torch.zeros(n, n, 3, dtype=torch.float64)
    for positions, color in zip(held, colors, strict=True):
        counts = count_pairs(mask, S, positions, edges)
        total += counts
        paint += counts[..., None] * color
    return total, paint / total.clamp_min(1)[..., None]


def _darkness(counts: Tensor, edges: Tensor) -> Tensor:
    """From 0 for cells without an allowed pair to 1 for those of which all are, float64 ``[n, n]``."""
    sizes = edges.diff()
    fraction = counts / (sizes[:, None] * sizes).double()
    return (fraction > 0) * (_PALEST + (1 - _PALEST) * fraction)


def _edges(S: int) -> Tensor:
    cells = min(S, CELLS)
    return torch.arange(cells + 1) * S // cells


def _shares(mask: Masked, S: int, held: Sequence[Tensor]) -> list[float]:
    """Each rank's share of all allowed pairs."""
    whole = torch.tensor([0, S])
    pairs = [int(count_pairs(mask, S, positions, whole)) for positions in held]
    return [n / max(sum(pairs), 1) for n in pairs]


def _draw_holders(ax: Any, held: Sequence[Tensor], edges: Tensor, colors: Tensor) -> None:
    """Who holds the queries, as a strip left of the picture, and the keys, as one below, within wider limits."""
    n, S = len(edges) - 1, int(edges[-1])
    counts = torch.stack([torch.bincount(torch.searchsorted(edges, p, right=True) - 1, minlength=n) for p in held])
    strip = (counts.double().T @ colors) / edges.diff()[:, None]
    near, far = 0.015 * S, 0.05 * S
    ax.imshow(strip[:, None].numpy(), extent=(-far, -near, S, 0), aspect="equal")
    ax.imshow(strip[None].numpy(), extent=(0, S, S + far, S + near), aspect="equal")
    ax.set_xlim(-far, S), ax.set_ylim(S + far, 0)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _label(ax: Any, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(x), ax.set_ylabel(y)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter("{x:,.0f}")


def _draw_legend(ax: Any, colors: Sequence[Tensor], shares: Sequence[float]) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(color=tuple(color.tolist()), label=f"rank {rank}: {share:.1%}")
        for rank, (color, share) in enumerate(zip(colors, shares, strict=True))
    ]
    ax.legend(
        handles=entries, title="share of the pairs", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False,
        ncols=_columns(len(entries)), fontsize=9, title_fontsize=9, alignment="left",
    )  # fmt: skip


def _columns(ranks: int) -> int:
    return -(-ranks // _ENTRIES)


def _colors(count: int) -> Sequence[Any]:
    if count <= len(COLORS):
        return COLORS[:count]
    from matplotlib import colormaps

    return [colormaps["turbo"](n / (count - 1))[:3] for n in range(count)]


def _as_rgb(color: Any) -> Tensor:
    from matplotlib.colors import to_rgb

    return torch.tensor(to_rgb(color), dtype=torch.float64)


def _require_matplotlib() -> None:
    with needed("plot", "matplotlib"):
        import matplotlib  # noqa: F401


def _new_axes(ranks: int) -> Any:
    import matplotlib.pyplot as plt

    size = 6.5 + 1.5 * _columns(ranks), 6
    return plt.figure(figsize=size, layout="constrained").add_subplot(anchor="W")  # the legend is on the right


def _length(mask: Masked, seq_len: int | None) -> int:
    own = mask.seq_len
    if seq_len is None and own is None:
        raise ValueError(f"seq_len: {mask!r} is for any length; pass the length to draw, as in plot(seq_len=4096)")
    length = as_int(own if seq_len is None else seq_len)
    if length is None or length < 1:
        raise ValueError(f"seq_len: expected an int of at least 1, got {own if seq_len is None else seq_len!r}")
    if own is not None and own != length:
        raise ValueError(f"seq_len: got {length}, but the mask is for {own} tokens; leave seq_len out")
    return length


def _held(layout: Placed | None, S: int, world_size: int) -> list[Tensor]:
    """The positions that each rank holds."""
    ranks = as_int(world_size)
    if ranks is None or ranks < 1:
        raise ValueError(f"world_size: expected an int of at least 1, got {world_size!r}")
    if layout is None:
        if ranks > 1:
            raise ValueError(f"layout: {ranks} ranks need one; pass the one that is used, such as df.Zigzag()")
        return [torch.arange(S)]
    if isinstance(layout, type) or not hasattr(layout, "positions"):
        raise ValueError(f"layout: expected a Layout such as df.Zigzag(), got {layout!r}")
    held = [layout.positions(S, ranks, rank) for rank in range(ranks)]
    if not torch.equal(torch.cat(held).sort().values, torch.arange(S)):
        raise ValueError(f"layout: {layout!r} does not give each of {S} positions to one of {ranks} ranks")
    return held
