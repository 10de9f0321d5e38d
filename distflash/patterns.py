"""Masks of particular models: attention sinks, video, images within text, and trees of rollouts.

In the pictures a row is a query, a column a key, and ``x`` stands where the query sees the key.

In a function that `torch.compile` compiles, these masks take their sequences as `Documents` does: the call reads and
checks them, when the graph runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from distflash.integers import FAR, as_boundaries, as_data, as_int, as_ints, as_tensors, set_count
from distflash.mask_algebra import Ends, Mask

Range = tuple[int, int]
Path = tuple[Range, ...]


@dataclass(frozen=True)
class FirstTokens(Mask):
    """Every query sees the first ``n`` keys and no other: ``[0, n)``.

    By itself it hides a query from itself; it is one side of ``|``. StreamingLLM
    (https://arxiv.org/abs/2309.17453) keeps the first few tokens as attention sinks beside a sliding window:
    ``Causal() & (Window(4095) | FirstTokens(4))``. ``FirstTokens(2)``::

        x x . . .
        x x . . .
        x x . . .
        x x . . .
        x x . . .

    Raises:
        ValueError: ``n`` is not an int of at least 0.

    Examples:
        >>> i = torch.arange(5)
        >>> (df.Causal() & (df.Window(1) | df.FirstTokens(1))).materialize(i, i).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 0, 1, 1, 0],
                [1, 0, 0, 1, 1]], dtype=torch.int32)
    """

    n: int

    def __post_init__(self) -> None:
        set_count(self, "n", least=0)

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        return torch.zeros_like(positions), torch.full_like(positions, min(self.n, FAR))

    def jumps(self, seq_len: int) -> Tensor:
        return torch.tensor([min(self.n, seq_len)])


@dataclass(frozen=True)
class BlockCausal(Mask):
    """A query sees all of its own block and the blocks before it: ``[0, end of its block)``.

    Autoregressive video models use it, with a block for each frame or group of frames: MAGI-1
    (https://arxiv.org/abs/2505.13211), CausVid (https://arxiv.org/abs/2412.07772). ``BlockCausal(2)``::

        x x . . .
        x x . . .
        x x x x .
        x x x x .
        x x x x x

    Args:
        size_or_boundaries: an int, the size of every block (the last may be cut short by the sequence's end); or, for
            blocks of unequal lengths, cumulative boundaries ``[0, b1, ..., S]`` as integers in a sequence, an array or
            a tensor ``[blocks + 1]``, as `Documents` takes them. A block that is empty is left out.

    Raises:
        ValueError: a size below 1; boundaries that do not start at 0, decrease, or are not integers.

    Examples:
        >>> i = torch.arange(5)
        >>> df.BlockCausal([0, 3, 5]).materialize(i, i).int()
        tensor([[1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 1],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    size_or_boundaries: int | tuple[int, ...]

    def __init__(self, size_or_boundaries: SupportsIndex | Sequence[SupportsIndex] | Tensor) -> None:
        name = "BlockCausal(size_or_boundaries)"
        compiling = torch.compiler.is_compiling()
        # The compiler cannot ask whether an array is an int: it holds no values yet.
        blocks = None if compiling and _is_array(size_or_boundaries) else as_int(size_or_boundaries)
        if blocks is not None:
            object.__setattr__(self, "size_or_boundaries", blocks)
            set_count(self, "size_or_boundaries", least=1)
        elif isinstance(size_or_boundaries, str | bytes) or not isinstance(size_or_boundaries, Iterable):
            raise ValueError(
                f"{name}: expected an int of at least 1 or boundaries [0, ..., S], got {size_or_boundaries!r}"
            )
        elif compiling:
            object.__setattr__(self, "size_or_boundaries", as_data(size_or_boundaries, name))  # type: ignore[arg-type]
        else:
            boundaries = as_boundaries(size_or_boundaries, name, "blocks")  # type: ignore[arg-type]
            object.__setattr__(self, "size_or_boundaries", boundaries)
            object.__setattr__(self, "graph_inputs", as_tensors(boundaries))

    def __reduce__(self) -> Any:
        return BlockCausal, (self.size_or_boundaries,)

    @property
    def seq_len(self) -> int | None:
        """The last boundary; None for blocks of one size."""
        return None if isinstance(self.size_or_boundaries, int) else self.size_or_boundaries[-1]

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        zero = torch.zeros_like(positions)
        if isinstance(self.size_or_boundaries, int):
            size = min(self.size_or_boundaries, FAR)
            return zero, torch.div(positions, size, rounding_mode="floor") * size + size
        stops = _table(self.size_or_boundaries[1:], positions)
        block = torch.searchsorted(stops, positions.contiguous(), right=True)
        return zero, stops[block.clamp_max(len(stops) - 1)]

    def jumps(self, seq_len: int) -> Tensor:
        if isinstance(self.size_or_boundaries, int):
            return torch.arange(0, seq_len, min(self.size_or_boundaries, FAR))
        return torch.tensor(self.size_or_boundaries)


@dataclass(frozen=True)
class ImageBlocks(Mask):
    """Causal, and both ways within each block: ``[0, max(i + 1, end of the block that holds i))``.

    Models of images and text use it, with a block for each image's tokens: Gemma 3 (https://arxiv.org/abs/2503.19786);
    PaliGemma (https://arxiv.org/abs/2407.07726), whose block holds image and prompt. Prefix-LM within packed documents
    is ``Documents(cu_seqlens) & ImageBlocks(starts, lengths)``, with each document's start and its prefix's length.
    ``ImageBlocks([1], [3])``::

        x . . . .
        x x x x .
        x x x x .
        x x x x .
        x x x x x

    Args:
        starts: integers ``[blocks]`` in a sequence, an array or a tensor, the first position of each block, ascending.
        lengths: integers ``[blocks]`` likewise, the tokens of each block. A block of no token is left out.

    Raises:
        ValueError: a start or length below 0, as many starts as lengths are not given, blocks that overlap or descend,
            or what is not integers.

    Examples:
        >>> i = torch.arange(5)
        >>> df.ImageBlocks(starts=[1], lengths=[3]).materialize(i, i).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    def __init__(self, starts: Sequence[SupportsIndex] | Tensor, lengths: Sequence[SupportsIndex] | Tensor) -> None:
        if torch.compiler.is_compiling():
            object.__setattr__(self, "starts", as_data(starts, "ImageBlocks(starts)", "the blocks' starts"))
            object.__setattr__(self, "lengths", as_data(lengths, "ImageBlocks(lengths)", "lengths"))
            return
        firsts = as_ints(starts, "ImageBlocks(starts)", "the blocks' starts")
        sizes = _as_lengths(lengths, "ImageBlocks(lengths)", len(firsts), "starts")
        stop = 0
        for n, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            if first < stop:
                raise ValueError(
                    f"ImageBlocks(starts): expected ascending blocks that do not overlap, but starts[{n}] = {first} "
                    f"is below {stop}" + (", where the block before it ends; sort and merge the blocks" if n else "")
                )
            stop = first + size
        if stop > FAR:
            raise ValueError(f"ImageBlocks(starts): expected blocks that end by 2**62, got one that ends at {stop}")
        kept = [(first, size) for first, size in zip(firsts, sizes, strict=True) if size]
        object.__setattr__(self, "starts", tuple(first for first, _ in kept))
        object.__setattr__(self, "lengths", tuple(size for _, size in kept))
        object.__setattr__(self, "graph_inputs", as_tensors(self.starts, self.lengths))

    def __reduce__(self) -> Any:
        return ImageBlocks, (self.starts, self.lengths)

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        # The last block that starts at or before i. Where i lies behind its end, i + 1 is the larger one.
        stops = (0, *(start + length for start, length in zip(self.starts, self.lengths, strict=True)))
        block = torch.searchsorted(_table(self.starts, positions), positions.contiguous(), right=True)
        return torch.zeros_like(positions), torch.maximum(positions + 1, _table(stops, positions)[block])

    def jumps(self, seq_len: int) -> Tensor:
        starts = torch.tensor(self.starts, dtype=torch.int64)
        return torch.cat([starts, starts + torch.tensor(self.lengths, dtype=torch.int64)])


@dataclass(frozen=True)
class Tree(Mask):
    """Sequences that share prefixes: a query sees its own segment causally, and all of its ancestors' segments.

    Each segment continues its parent's text. For example a prompt and its rollouts in reinforcement learning, or the
    prefix tree of several samples; see tree attention in SpecInfer (https://arxiv.org/abs/2305.09781). One prompt of 2
    tokens with two rollouts of 2, ``Tree(parents=[-1, 0, 0], lengths=[2, 2, 2])``::

        x . . . . .
        x x . . . .
        x x x . . .
        x x x x . .
        x x . . x .
        x x . . x x

    The keys of a query are ``[start of its segment, i + 1)`` and the ranges of its ancestors: several intervals, which
    `parts` assigns to as few parts with monotone bounds as it finds. A prompt with any number of rollouts needs two.
    Segments in depth-first or breadth-first order need few; other orders may need more, and are slower.

    Args:
        parents: integers ``[segments]`` in a sequence, an array or a tensor: the segment that each one continues,
            which comes before it, or -1 for a root.
        lengths: integers ``[segments]`` likewise, the tokens of each segment, at least 0.

    Raises:
        ValueError: a parent that does not come before its segment, a length below 0, as many parents as lengths are
            not given, or what is not integers.

    Examples:
        >>> i = torch.arange(6)
        >>> df.Tree(parents=[-1, 0, 0], lengths=[2, 2, 2]).materialize(i, i).int()
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [1, 1, 1, 1, 0, 0],
                [1, 1, 0, 0, 1, 0],
                [1, 1, 0, 0, 1, 1]], dtype=torch.int32)
    """

    parents: tuple[int, ...]
    lengths: tuple[int, ...]

    def __init__(self, parents: Sequence[SupportsIndex] | Tensor, lengths: Sequence[SupportsIndex] | Tensor) -> None:
        if torch.compiler.is_compiling():
            object.__setattr__(self, "parents", as_data(parents, "Tree(parents)", "the segments' parents"))
            object.__setattr__(self, "lengths", as_data(lengths, "Tree(lengths)", "lengths"))
            return
        ints = as_ints(parents, "Tree(parents)", "the segments' parents")
        for n, parent in enumerate(ints):
            if not -1 <= parent < n:
                raise ValueError(
                    f"Tree(parents): expected a segment before segment {n}, or -1 for a root, but parents[{n}] = "
                    f"{parent}; put every segment behind its parent"
                )
        sizes = _as_lengths(lengths, "Tree(lengths)", len(ints), "parents")
        if sum(sizes) > FAR:
            raise ValueError(f"Tree(lengths): expected at most 2**62 tokens, got {sum(sizes)}")
        object.__setattr__(self, "parents", ints)
        object.__setattr__(self, "lengths", sizes)
        object.__setattr__(self, "graph_inputs", as_tensors(ints, sizes))

    def __reduce__(self) -> Any:
        return Tree, (self.parents, self.lengths)

    @property
    def seq_len(self) -> int:
        return sum(self.lengths)

    def parts(self, positions: Tensor, seq_len: int) -> tuple[Ends, ...]:
        tables = _tables(self.parents, self.lengths)
        segment = torch.searchsorted(_table(tables.starts, positions), positions.contiguous(), right=True) - 1
        own = _table(tables.own, positions)[segment], positions + 1
        return own, *((_table(los, positions)[segment], _table(his, positions)[segment]) for los, his in tables.above)

    def jumps(self, seq_len: int) -> Tensor:
        return torch.tensor(_tables(self.parents, self.lengths).starts)


class _Tables(NamedTuple):
    """A tree's intervals, by segments that have tokens."""

    starts: tuple[int, ...]  # where each segment begins
    own: tuple[int, ...]  # where the range begins that ends with the query itself
    above: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # each further pair of ends


@lru_cache(maxsize=64)
def _tables(parents: tuple[int, ...], lengths: tuple[int, ...]) -> _Tables:
    starts = tuple(accumulate(lengths, initial=0))[:-1]
    rows = [n for n, length in enumerate(lengths) if length]
    if not rows:
        return _Tables((0,), (0,), ())
    # Longer ranges make fewer intervals, but cutting them at every fork lets more of them share a staircase in some
    # trees. Neither is better in all.
    choices = []
    for join_forks in (True, False):
        paths = _paths(parents, lengths, starts, join_forks=join_forks)
        own = tuple(paths[n][-1][0] for n in rows)
        stairs = _staircases([paths[n][:-1] for n in rows])
        above = tuple((tuple(lo for lo, _ in steps), tuple(hi for _, hi in steps)) for steps in stairs)
        choices.append(_Tables(tuple(starts[n] for n in rows), own, above))
    return min(choices, key=lambda tables: len(tables.above))


def _paths(
    parents: tuple[int, ...], lengths: tuple[int, ...], starts: tuple[int, ...], *, join_forks: bool
) -> list[Path]:
    """For each segment, the ranges of its ancestors and, last, its own. Ranges that touch are joined.

    The start of the last range does not decrease from one segment to the next: it is either the segment's start, or the
    segment continues the previous one and shares its last range.
    """
    children = Counter(parents)
    paths: list[Path] = []
    for parent, length, start in zip(parents, lengths, starts, strict=True):
        above = paths[parent] if parent >= 0 else ()
        if not length:
            paths.append(above)
        elif above and above[-1][1] == start and (join_forks or children[parent] == 1):
            paths.append((*above[:-1], (above[-1][0], start + length)))
        else:
            paths.append((*above, (start, start + length)))
    return paths


def _staircases(rows: Sequence[Path]) -> list[list[Range]]:
    """Each row's disjoint ranges spread over staircases: one range a row at most, both ends non-decreasing.

    First fit. A row without a range is empty at the staircase's last end, ``lo = hi``, so what follows such a row
    begins there or later.
    """
    stairs: list[list[Range]] = []
    for n, ranges in enumerate(rows):
        for lo, hi in ranges:
            for steps in stairs:
                if len(steps) == n and lo >= steps[-1][0] and hi >= steps[-1][1]:
                    steps.append((lo, hi))
                    break
            else:
                stairs.append([(0, 0)] * n + [(lo, hi)])
        for steps in stairs:
            if len(steps) == n:
                steps.append((steps[-1][1], steps[-1][1]))
    return stairs


def _as_lengths(values: Sequence[SupportsIndex] | Tensor, name: str, count: int, beside: str) -> tuple[int, ...]:
    lengths = as_ints(values, name, "lengths")
    if len(lengths) != count:
        raise ValueError(f"{name}: expected {count}, as many as {beside}, got {len(lengths)}")
    for n, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{name}: expected at least 0 tokens, but lengths[{n}] = {length}")
    return lengths


def _is_array(value: object) -> bool:
    return not isinstance(value, int) and getattr(value, "ndim", 0) > 0


def _table(values: tuple[int, ...], positions: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=positions.device)
