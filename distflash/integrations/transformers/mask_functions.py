"""Converts mask functions of Transformers to masks.

Transformers composes a model's mask from functions ``(batch, head, query, key) -> bool``: causal, windows, chunks and
blocks of tokens, combined by ``and_masks`` and ``or_masks``. Most are closures. They are recognised by their code
object, which all closures of a factory share, and their parameters are read from the closure. A conversion is used only
if it agrees with the installed library's function on an example. Other functions raise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import pairwise
from operator import and_, or_
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as library

from distflash.mask_algebra import Ends, Mask
from distflash.masks import Causal, Chunked, Full, Window
from distflash.patterns import ImageBlocks

MaskFunction = Callable[..., Any]
# From the variables of a closure to the mask.
_Reading = Callable[[Mapping[str, Any]], Mask]


class NotReadable(Exception):
    """A function is unknown or cannot be a mask. The text is for the user."""


@dataclass(frozen=True)
class TokenBlocks(Mask):
    """A query in a block sees the block; others see nothing.

    starts, stops: of the blocks, ascending, without overlap.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def ends(self, positions: Tensor, seq_len: int) -> Ends:
        starts, stops = (torch.tensor((0, *x), device=positions.device) for x in (self.starts, self.stops))
        block = torch.searchsorted(starts[1:], positions.contiguous(), right=True)
        within = positions < stops[block]
        return torch.where(within, starts[block], positions), torch.where(within, stops[block], positions)


@dataclass(frozen=True)
class BlocksSource:
    """The tokens from which a mask's blocks were made.

    seq_len: their number. apart: ``(stop, start)`` of gaps within a block, ascending by start. A document has to end in
    each gap; otherwise the two parts would see each other.
    """

    seq_len: int
    apart: tuple[tuple[int, int], ...]


@torch.compiler.disable
def read_mask(function: MaskFunction) -> tuple[Mask, tuple[BlocksSource, ...]]:
    """The mask of a function, and the sources of its blocks.

    Raises:
        NotReadable: the function is unknown, or cannot be a mask.
    """
    sources: list[BlocksSource] = []
    return _read(function, sources), tuple(sources)


def _read(function: MaskFunction, sources: list[BlocksSource]) -> Mask:
    code = getattr(function, "__code__", None)
    variables = _variables(function)
    if code in _combinations():
        sides = [_read(side, sources) for side in variables["mask_functions"]]
        return _all(sides) if _combinations()[code] is and_ else _any(sides)
    if code is not None and code is _blocks_code():
        mask, source = _blocks(variables["block_sequence_ids"])
        sources.append(source)
        return mask
    reading = None if code is None else _readings().get(code)
    if reading is None:
        name = getattr(function, "__qualname__", repr(function))
        raise NotReadable(
            f"mask: the model asks for the mask function {name} of {getattr(function, '__module__', None)}, which is "
            "not supported: what it allows is not known here. Known are causal and bidirectional masks, windows, "
            "chunks, blocks of tokens, and and_masks and or_masks of these"
        )
    return reading(variables)


def _variables(function: MaskFunction) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _all(sides: list[Mask]) -> Mask:
    return reduce(and_, sides)


def _any(sides: list[Mask]) -> Mask:
    """The union. Causal with blocks becomes `ImageBlocks`, which has one interval per query."""
    kinds = {type(side): side for side in sides}
    if len(sides) == 2 and kinds.keys() == {Causal, TokenBlocks}:
        blocks: Any = kinds[TokenBlocks]
        return ImageBlocks(blocks.starts, [b - a for a, b in zip(blocks.starts, blocks.stops, strict=True)])
    return reduce(or_, sides)


# Functions of positions alone -----------------------------------------------------------------------------------------


def _window(variables: Mapping[str, Any]) -> Mask:
    return Window(_count(variables["sliding_window"], least=1) - 1, sys.maxsize)


def _window_both_ways(variables: Mapping[str, Any]) -> Mask:
    size = _count(variables["sliding_window"], least=0)
    return Window(size, size)


def _chunks(variables: Mapping[str, Any]) -> Mask:
    # Positions do not count padding, so chunks need no shift.
    return Chunked(_count(variables["chunk_size"], least=1))


def _count(size: Any, least: int) -> int:
    if not isinstance(size, int) or size < least:
        raise NotReadable(f"mask: the model asks for keys within {size!r} tokens; expected an int of at least {least}")
    return size


@lru_cache
def _readings() -> dict[CodeType, _Reading]:
    """Conversions by code object, without those that disagree with the installed version."""
    padding = torch.zeros(1, dtype=torch.int64)
    examples: list[tuple[Any, _Reading]] = [
        (library.causal_mask_function, lambda _: Causal()),
        (library.bidirectional_mask_function, lambda _: Full()),
        (library.sliding_window_overlay(3), _window),
        (library.sliding_window_bidirectional_overlay(3), _window_both_ways),
        (library.chunked_overlay(3, padding), _chunks),
    ]
    return {f.__code__: reading for f, reading in examples if _says(f, reading(_variables(f)))}


@lru_cache
def _combinations() -> dict[CodeType, Callable[[Any, Any], Any]]:
    def before(_: Any, __: Any, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def near(_: Any, __: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key - query).abs() <= 2

    examples = [(library.and_masks(before, near), and_), (library.or_masks(before, near), or_)]
    return {f.__code__: combine for f, combine in examples if _says(f, combine(Causal(), Window(2, 2)))}


def _says(function: MaskFunction, mask: Mask) -> bool:
    """Whether a function agrees with a mask on 8 positions."""
    positions = torch.arange(8)
    said = function(torch.zeros(1, dtype=torch.int64), 0, positions[:, None], positions[None, :])
    return torch.equal(said.expand(8, 8), mask.materialize(positions, positions))


# Blocks of tokens -----------------------------------------------------------------------------------------------------


@lru_cache
def _blocks_code() -> CodeType | None:
    function = library.blockwise_overlay(torch.tensor([[0, 0, -1, -1, 4, 4, 5, -1]]))
    return function.__code__ if _says(function, TokenBlocks((0, 4, 6), (2, 6, 7))) else None


def _blocks(ids: Tensor) -> tuple[TokenBlocks, BlocksSource]:
    """The blocks of ``ids [B, S]``: tokens with the same id see each other; negative ids are in no block."""
    rows = ids.detach().cpu()
    row = rows[0]
    if not bool((rows == row).all()):
        raise NotReadable(
            "mask: the sequences of the batch have their images or prefixes in different places, but one mask serves "
            "all of them; pack them into one sequence, or use batches of one"
        )
    changes = (row.diff() != 0).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(row)]
    runs = [(int(row[a]), a, b) for a, b in pairwise(bounds) if row[a] >= 0]
    apart: list[tuple[int, int]] = []
    last: dict[int, int] = {}
    for id_, start, stop in runs:
        if id_ in last:
            apart.append((last[id_], start))
        last[id_] = stop
    blocks = TokenBlocks(tuple(start for _, start, _ in runs), tuple(stop for *_, stop in runs))
    return blocks, BlocksSource(len(row), tuple(apart))
