"""The order in which key blocks add to dQ: tables against brute force, and the schedule run by hand."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distflash import masks
from distflash.geometry import Geometry
from distflash.intervals import Intervals, build
from distflash.kernels.hopper import common
from distflash.kernels.hopper.tiles import KEYS, QUERIES
from distflash.layouts import Contiguous, Zigzag
from distflash.turns import turns_of
from tests.oracle import Blind
from tests.pure.test_hopper_common import Pointer, blocks, in_python, span, visited
from tests.strategies import examples

pick = in_python(common.pick)


@st.composite
def columns(draw) -> Intervals:
    """Any column bounds that do not decrease, also of blocks of keys that nobody sees."""
    queries, keys, run = draw(st.integers(1, 700)), draw(st.integers(1, 1500)), draw(st.sampled_from([50, 128, 200]))
    count = -(-keys // run)
    ends = st.lists(st.integers(0, queries), min_size=count, max_size=count).map(sorted)
    lo, hi = (torch.tensor(draw(ends), dtype=torch.int32).repeat_interleave(run)[:keys] for _ in range(2))
    row, nothing = torch.zeros(queries, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    return Intervals(range(keys), row, row, torch.minimum(lo, hi), torch.maximum(lo, hi), nothing, nothing, pairs=0)


def tiles_of(rows: Intervals) -> list[list[int]]:
    """By key blocks, the query tiles that each adds to, in the kernel's order."""
    lo, hi, found = Pointer(rows.col_lo), Pointer(rows.col_hi), []
    for first, last in blocks(len(rows.col_lo), KEYS):
        begin, before, full, tiles = span(lo, hi, first, last, QUERIES, QUERIES)
        found.append([begin // QUERIES + visited(i, before, full, tiles, True) for i in range(tiles)])
    return found


@examples(100)
@given(columns())
def test_turns_count_the_earlier_blocks_of_a_tile(rows):
    turns, adds = turns_of(rows, KEYS, QUERIES), tiles_of(rows)
    assert turns.earlier.dtype == turns.ended.dtype == torch.int32
    assert len(turns.earlier) == len(adds) and len(turns.ended) == -(-len(rows.row_lo) // QUERIES)
    for block, tiles in enumerate(adds):
        for tile in tiles:
            before = sum(tile in of_other for of_other in adds[:block])
            assert int(turns.earlier[block] - turns.ended[tile]) == before


def issued(blocks: int, heads: int, heads_at_once: int) -> Iterator[tuple[int, int]]:
    """``(block, head)`` in the order of the counter."""
    return (pick(n, blocks, heads, heads_at_once) for n in range(blocks * heads))


class Program:
    """What a program has yet to add: by work tiles, in the order in which it took them."""

    def __init__(self) -> None:
        self.work: list[list[tuple[int, tuple[int, int]]]] = []

    def add(self, semaphores: dict[tuple[int, int], int], earlier: list[int]) -> tuple[int, tuple[int, int]] | None:
        """Add to the next tile: the block and its ``(head, tile)``; None if it is not the block's turn."""
        if not self.work or semaphores[self.work[0][0][1]] != earlier[self.work[0][0][0]]:
            return None
        done = self.work[0].pop(0)
        semaphores[done[1]] += 1
        if not self.work[0]:
            self.work.pop(0)
        return done


def run(rows: Intervals, heads: int, heads_at_once: int, programs: int, seed: int) -> dict[tuple[int, int], list[int]]:
    """All that is added, by ``(head, tile)``: programs run in any order, and take a work tile ahead of the last one.

    Raises:
        AssertionError: no program can go on, and work is left.
    """
    chance, turns, adds = random.Random(seed), turns_of(rows, KEYS, QUERIES), tiles_of(rows)
    earlier = turns.earlier.tolist()
    semaphores = {(head, tile): n for head in range(heads) for tile, n in enumerate(turns.ended.tolist())}
    waiting = [(b, h) for b, h in issued(len(adds), heads, heads_at_once) if adds[b]][::-1]
    running, added = [Program() for _ in range(programs)], defaultdict(list)
    while waiting or any(program.work for program in running):
        moved = False
        for program in chance.sample(running, programs):
            if waiting and len(program.work) < 2:
                block, head = waiting.pop()
                program.work.append([(block, (head, tile)) for tile in adds[block]])
                moved = True
            for _ in range(chance.randrange(4)):
                if (done := program.add(semaphores, earlier)) is not None:
                    added[done[1]].append(done[0])
                    moved = True
        able = [p for p in running if p.work and semaphores[p.work[0][0][1]] == earlier[p.work[0][0][0]]]
        assert moved or able, "a deadlock"
    return added


@pytest.mark.parametrize(("heads", "heads_at_once", "programs"), [(3, 2, 7), (5, 4, 1), (2, 1, 40)])
@examples(30)
@given(columns(), st.integers(0, 2**16))
def test_work_tiles_that_are_issued_in_order_wait_for_none_that_is_not(heads, heads_at_once, programs, rows, seed):
    added = run(rows, heads, heads_at_once, programs, seed)
    expected = defaultdict(list)
    for block, tiles in enumerate(tiles_of(rows)):
        for tile in tiles:
            expected[tile].append(block)  # ascending
    assert added == {(head, tile): order for head in range(heads) for tile, order in expected.items()}


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag()], ids=repr)
@pytest.mark.parametrize(
    "mask",
    [masks.Causal(), masks.Full(), masks.Window(300, 100), Blind(130, 700), masks.Documents((0, 3, 900, 1501))],
    ids=repr,
)
def test_every_pass_of_a_ring_ends(mask, layout):
    geometry = Geometry.of_sequence(mask, layout, 1501, 2)
    for rank in range(2):
        for source in range(2):
            rows = build(geometry, rank, source)[0]
            added = run(rows, 2, 2, 5, seed=rank)
            assert sum(map(len, added.values())) == 2 * sum(map(len, tiles_of(rows)))
