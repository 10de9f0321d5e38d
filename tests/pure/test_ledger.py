"""Ledgers: every position is stored once, ranks are balanced, and equal ledgers are one object."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.ledger import Ledger
from tests.growing import Lopsided
from tests.strategies import examples

LAYOUTS = st.sampled_from([df.Contiguous(), df.Zigzag(), df.Striped(), Lopsided()])
parts = st.lists(st.tuples(st.booleans(), st.integers(0, 17)), max_size=8)


def grown(world_size, layout, parts):
    """The ledgers that follow one another: chunks, or dealt tokens."""
    ledgers = [Ledger.empty(world_size)]
    for chunk, tokens in parts:
        last = ledgers[-1]
        ledgers.append(last.with_chunk(layout, tokens) if chunk else last.with_step(tokens))
    return ledgers


@examples(100)
@given(st.integers(1, 8), LAYOUTS, parts)
def test_every_position_is_kept_once_and_evenly(world_size, layout, parts):
    for before, after in pairwise(grown(world_size, layout, parts)):
        every = torch.cat(after.held).sort().values
        assert torch.equal(every, torch.arange(after.total, dtype=torch.int32))
        assert all((held.diff() > 0).all() for held in after.held)
        assert max(after.counts) == -(-after.total // world_size) and after.counts == list(map(len, after.held))
        for old, new in zip(before.held, after.held, strict=True):
            assert torch.equal(new[: len(old)], old), "keys stay where they are"


@examples(100)
@given(st.integers(1, 8), LAYOUTS, parts, st.integers(1, 17))
def test_moves_are_what_is_kept_elsewhere(world_size, layout, parts, tokens):
    before = grown(world_size, layout, parts)[-1]
    after = before.with_chunk(layout, tokens)
    brought = [set((layout.positions(tokens, world_size, rank) + before.total).tolist()) for rank in range(world_size)]
    for move in after.moves:
        positions = move.positions.tolist()
        assert positions == sorted(positions) and move.sender != move.receiver and positions
        brought[move.sender] -= set(positions)
        brought[move.receiver] |= set(positions)
    for rank, held in enumerate(after.held):
        assert set(held[len(before.held[rank]) :].tolist()) == brought[rank]


@given(st.integers(1, 8), LAYOUTS, parts, st.data())
def test_truncated_and_keeping(world_size, layout, parts, data):
    ledger = grown(world_size, layout, parts)[-1]
    total = data.draw(st.integers(0, ledger.total))
    first = ledger.truncated(total)
    cuts = sorted(data.draw(st.sets(st.integers(0, ledger.total), max_size=4)))
    some = tuple(range(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False))
    fewer = ledger.keeping(some)
    assert first.total == total and fewer.total == ledger.total
    for held, of_first, of_fewer in zip(ledger.held, first.held, fewer.held, strict=True):
        assert of_first.tolist() == [p for p in held.tolist() if p < total]
        assert of_fewer.tolist() == [p for p in held.tolist() if any(p in r for r in some)]
    ends = torch.arange(-1, ledger.total + 2)
    for rank, held in enumerate(ledger.held):
        assert ledger.count_below(ends, rank).tolist() == [sum(p < int(end) for p in held.tolist()) for end in ends]


def test_the_same_done_to_the_same_ledger_is_one_object():
    """So that the layers of a model share a plan; and nothing is kept that nobody has."""
    ledger, layout = Ledger.empty(3), df.Zigzag()
    chunk = ledger.with_chunk(layout, 7)
    assert ledger.with_chunk(layout, 7) is chunk and ledger.with_chunk(df.Striped(), 7) is not chunk
    for again in (
        lambda: chunk.with_step(2),
        lambda: chunk.truncated(3),
        lambda: chunk.keeping((range(2), range(5, 7))),
    ):
        first = again()
        assert again() is first
    assert chunk.with_step(0) is chunk and chunk.truncated(7) is chunk
    assert len(ledger._next) == 1, "what nobody has is forgotten"
