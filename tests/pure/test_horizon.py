"""Mask bounds of future tokens, and errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.horizon import Horizon
from distflash.ledger import Ledger
from tests.strategies import examples, masks, patterns, rows

CPU = torch.device("cpu")


@examples(60)
@given(st.data(), st.integers(0, 30), st.integers(0, 20))
def test_the_table_is_the_mask(data, start, count):
    one = masks(24) | patterns(24)
    mask = data.draw(one | rows(24, 2))
    horizon = Horizon.of(mask, start, count, CPU)
    of_rows = mask.masks if isinstance(mask, df.Rows) else [mask]
    stop = min(start + count, *(24 if m.seq_len is not None else start + count for m in of_rows))
    keys = torch.arange(64)
    for row, each in enumerate(of_rows):
        for position in range(start, stop):
            lo, hi = horizon.ends[row, :, :, position - start]
            got = ((keys >= lo[:, None]) & (keys < hi[:, None])).any(0)
            length = 2**31 - 1 if each.seq_len is None else each.seq_len
            expected = each.materialize(torch.tensor([position]), keys, length)[0] & (keys < length)
            assert torch.equal(got, expected)
            ahead = bool(expected[position + 1 :].any())
            alone = Horizon.of(each, start, count, CPU)
            assert (alone.refusal((position,), 1) is not None) == ahead, (each, position)


@pytest.mark.parametrize("mask", [df.PrefixLM(8), df.ImageBlocks([2], [4]), df.BlockCausal([0, 8, 9, 10, 11, 40])])
def test_a_prefix_does_not_stop_what_comes_after_it(mask):
    horizon = Horizon.of(mask, 0, 40, CPU)
    assert horizon.refusal((8,), 3) is None
    assert "the token at 4 see keys that come after it" in horizon.refusal((4,), 1) if mask.seq_len is None else True


def test_each_sequence_by_its_own_length_and_mask():
    horizon = Horizon.of(df.Rows([df.PrefixLM(8), df.Causal()]), 0, 40, CPU)
    assert horizon.refusal((8, 0), 1) is None
    assert "the token at 5 " in horizon.refusal((5, 20), 1)
    one = Horizon.of(df.ImageBlocks([10], [4]), 0, 40, CPU)
    assert one.refusal((14, 2), 5) is None
    assert "the token at 10 " in one.refusal((20, 7), 4)


def test_more_tokens_than_the_mask_knows():
    horizon = Horizon.of(df.Causal() & df.Documents([0, 5, 12]), 0, 40, CPU)
    assert horizon.refusal((11, 3), 1) is None
    words = horizon.refusal((11, 3), 2)
    assert "for a sequence of 12 tokens, but with this call a sequence of the cache has 13" in words


def test_covers():
    horizon = Horizon.of(df.Causal(), 5, 10, CPU)
    assert horizon.covers(5, 15) and not horizon.covers(4, 6) and not horizon.covers(14, 16)


def test_keys_that_were_dropped_are_needed():
    ledger = Ledger.empty(3).with_chunk(df.Striped(), 20).keeping((range(16, 20),))
    for left, needed in ((3, False), (4, False), (5, True)):
        assert Horizon.of(df.Window(left), 0, 40, CPU).needs_dropped(0, ledger, 20, 1) is needed
    assert Horizon.of(df.Window(3), 0, 40, CPU).needs_dropped(0, ledger.truncated(18), 18, 1)


def test_a_ledger_that_lags_behind_gives_the_same_answer():
    ledger = Ledger.empty(3).with_chunk(df.Striped(), 20).keeping((range(16, 20),))
    for left in range(12):
        horizon = Horizon.of(df.Window(left), 0, 60, CPU)
        for dealt in range(9):
            late = horizon.needs_dropped(0, ledger, 20 + dealt, 2)
            assert late == horizon.needs_dropped(0, ledger.with_step(dealt), 20 + dealt, 2) == (left > 4 + dealt)


def test_no_answer_takes_longer_over_more_keys():
    """A step asks a table; nothing of the mask is computed again."""
    asked = []

    class Watched(df.Causal):
        def ends(self, positions, seq_len):
            asked.append(len(positions))
            return super().ends(positions, seq_len)

    cache = df.Cache(None, batch=1, kv_heads=1, d_qk=8, capacity=64, dtype=torch.float32)
    mask, x = Watched(), torch.zeros(1, 1, 1, 8)
    for _ in range(64):
        df.decode(x, x, x, cache=cache, mask=mask)
    assert asked == [64]
