"""Encoding of a rank's report as a row of integers, and decoding."""

import pytest

import distflash as df
from distflash.messages import FIELDS, WIDTH, Message, difference

ROWS = [
    Message.about("attention forward", {"heads": 3, "mask": df.Causal(), "scale": None}, 7),
    Message.about("attention backward", {}, 2**40),
    Message.about("a batch", {f"field {n}": 2**70 + n for n in range(FIELDS)}, 0),
    Message.refusing("größe", 1),
]


@pytest.mark.parametrize("message", ROWS, ids=lambda message: message.kind)
def test_rows_have_one_width_and_fit_int64(message):
    row = message.packed()
    assert len(row) == WIDTH and all(-(2**63) <= value < 2**63 for value in row)
    again = Message.unpacked(row)
    assert (again.call, again.refuses, again.names) == (message.call, message.refuses, message.names)
    assert again.codes[: len(message.codes)] == message.codes and len(again.codes) == FIELDS


def test_long_kinds_that_begin_alike_differ():
    messages = [Message.about("x" * 60 + end, {"n": 1}, 0) for end in "ab"]
    assert "by different names" in difference([Message.unpacked(m.packed()) for m in messages], 0, {"n": 1})


def test_messages_that_agree():
    same = [Message.unpacked(ROWS[0].packed())] * 3
    assert difference(same, 1, {"heads": 3, "mask": df.Causal(), "scale": None}) is None
