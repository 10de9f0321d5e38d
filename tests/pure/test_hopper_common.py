"""Hopper kernels visit only existing tiles: the kernels' functions, run as Python on plans' data."""

from __future__ import annotations

import types
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distflash.geometry import Geometry
from distflash.intervals import build
from distflash.kernels.hopper import backward_parts, common, forward_loads
from distflash.kernels.triton import common as portable
from distflash.liveness import GROUP_ROWS
from tests.strategies import examples, layouts, masks


@dataclass(frozen=True)
class Pointer:
    """An element of a tensor, which must exist when it is loaded."""

    tensor: Tensor
    at: int = 0

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.tensor, self.at + offset)

    def load(self, mask: bool = True, other: int = 0) -> int:
        if not mask:
            return other
        assert 0 <= self.at < len(self.tensor), f"element {self.at} of {len(self.tensor)}"
        return int(self.tensor[self.at])


LANGUAGE = types.SimpleNamespace(
    load=Pointer.load,
    where=lambda condition, a, b: a if condition else b,
    cdiv=lambda a, b: -(-a // b),
    minimum=min,
    maximum=max,
)


CALLEES = {
    common.visited: dict(nth=common.nth),
    backward_parts.place_of: dict(visited=common.visited),
    backward_parts.is_masked: dict(visited=common.visited),
}


def in_python(function):
    """A device function as one of Python's, with integers for its scalars."""
    body = function.fn
    known = dict(
        gl=LANGUAGE,
        tl=LANGUAGE,
        GROUP_ROWS=GROUP_ROWS,
        **{name: in_python(callee) for name, callee in CALLEES.get(function, {}).items()},
    )
    return types.FunctionType(body.__code__, known, body.__name__, body.__defaults__)


locate, portable_locate = in_python(common.locate), in_python(portable.locate)
span, nth, visited = in_python(common.span), in_python(common.nth), in_python(common.visited)
place_of, is_masked = in_python(backward_parts.place_of), in_python(backward_parts.is_masked)
at_least_one = in_python(forward_loads.at_least_one)


@st.composite
def intervals(draw):
    seq_len, world_size = draw(st.integers(1, 300)), draw(st.integers(1, 8))
    geometry = Geometry.of_sequence(draw(masks(seq_len)), draw(layouts), seq_len, world_size)
    rank, source = (draw(st.integers(0, world_size - 1)) for _ in range(2))
    return build(geometry, rank, source)[0]


def blocks(length: int, block: int) -> list[tuple[int, int]]:
    return [(first, min(first + block, length) - 1) for first in range(0, length, block)]


@pytest.mark.parametrize(("block_m", "block_n"), [(64, 128), (64, 64), (16, 8)])
@examples(80)
@given(intervals(), st.integers(0, 5))
def test_backward_adds_to_tiles_of_its_own_head(block_m, block_n, rows, plane):
    """A block of keys visits tiles of queries that exist, all that it needs; and none if no query sees it."""
    queries, keys = len(rows.row_lo), len(rows.col_lo)
    lo, hi = Pointer(rows.col_lo), Pointer(rows.col_hi)
    tiles_of_a_head = -(-queries // block_m)
    for first, last in blocks(keys, block_n) if queries else ():
        begin, before, full, tiles = span(lo, hi, first, last, block_m, block_m)
        starts = [begin + nth(i, before, full, tiles - full) * block_m for i in range(tiles)]
        needed = {
            query // block_m * block_m
            for key in range(first, last + 1)
            for query in range(int(rows.col_lo[key]), int(rows.col_hi[key]))
        }
        assert needed <= set(starts) and len(set(starts)) == len(starts)
        assert all(0 <= start < queries for start in starts)
        in_order = [begin + visited(i, before, full, tiles, True) * block_m for i in range(tiles)]
        assert in_order == sorted(starts, reverse=True)
        masked = {start for i, start in enumerate(in_order) if is_masked(i, before, full, tiles, True)}
        assert masked == {start for i, start in enumerate(starts) if is_masked(i, before, full, tiles, False)}
        places = [place_of(i, plane, (begin, before, full, tiles), queries, block_m) for i in range(tiles)]
        assert all(plane * tiles_of_a_head <= place < (plane + 1) * tiles_of_a_head for place in places)
        if not tiles:
            zeroed = {key for keys in rows.unseen for key in keys}
            assert set(range(first, last + 1)) <= zeroed


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 128), (192, 64), (8, 16)])
@examples(80)
@given(intervals())
def test_forward_reads_tiles_that_exist_or_zeros(block_m, block_n, rows):
    """A block of queries visits tiles of keys that exist; or one before the first key, where zeros are read."""
    queries, keys = len(rows.row_lo), len(rows.col_lo)
    lo, hi = Pointer(rows.row_lo), Pointer(rows.row_hi)
    for first, last in blocks(queries, block_m) if keys else ():
        begin, before, full, tiles = span(lo, hi, first, last, block_n, 1)
        seen = int(rows.row_hi[last]) > int(rows.row_lo[first])
        begin, tiles = at_least_one(begin, tiles, 0, block_n)
        starts = [begin + nth(i, before, full, tiles - full) * block_n for i in range(tiles)]
        if seen:
            assert starts and all(0 <= start < keys for start in starts)
            covered = {key for start in starts for key in range(start, start + block_n)}
            assert set(range(int(rows.row_lo[first]), int(rows.row_hi[last]))) <= covered
        else:
            assert starts == [-block_n]


@pytest.mark.parametrize("block", [16, 64, 128, 192])
@given(st.integers(1, 4 * GROUP_ROWS), st.data())
def test_blocks_of_live_rows_are_all_of_these_once(block, queries, data):
    numbers = sorted(data.draw(st.sets(st.integers(0, (queries - 1) // GROUP_ROWS), min_size=1)))
    flags = {GROUP_ROWS * n: data.draw(st.integers(1, 63)) for n in numbers}
    expected = [row for start in flags for row in range(start, min(start + GROUP_ROWS, queries))]
    groups = Pointer(torch.tensor(list(flags.items())).flatten())
    covered = []
    for row in range(0, len(expected), block):
        first, found = locate(row, groups, -1)
        assert (first, found) == portable_locate(row, groups, -1, block)
        assert found == flags[first // GROUP_ROWS * GROUP_ROWS]
        covered += range(first, min(first + block, queries))
    assert covered == expected


@given(st.integers(0, 10**6), st.integers(0, 63))
def test_all_rows_need_no_list(number, flags):
    nothing = Pointer(torch.empty(0))
    assert locate(number * 128, nothing, flags) == (number * 128, flags)
    assert portable_locate(number * 64, nothing, flags, 64) == (number * 64, flags)


def test_none_is_forced_beside_another_source():
    assert at_least_one(7, 0, 3, 16) == (7, 0)
    assert at_least_one(7, 0, 0, 16) == (-16, 1)
    assert at_least_one(7, 2, 0, 16) == (7, 2)
    assert torch.equal(torch.tensor(nth(0, 0, 0, 1)), torch.tensor(0))
