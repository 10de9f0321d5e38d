"""Wrong calls of the public API: the error and its message on every rank, and that nothing was sent."""

import re

import pytest

import distflash as df
from distflash.transport import Simulator
from tests.wrong_calls import W
from tests.wrong_chunks import ROWS


def told(call, cp):
    """The error's type and text."""
    with pytest.raises(Exception) as caught:
        call(cp)
    return caught.type, str(caught.value)


def test_the_table():
    assert len(ROWS) >= 200
    names = [row.what for row in ROWS]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_a_wrong_call_is_refused_on_every_rank_before_anything_is_sent(row):
    simulator = Simulator(row.simulated)
    answers = simulator.run(lambda transport: told(row.call, df.ContextParallel(transport)))
    for kind, text in answers:
        assert issubclass(kind, row.error) and re.match(row.words, text), f"{kind.__name__}: {text}"
    assert len(answers) == row.simulated and simulator.traffic.messages == 0


@pytest.mark.parametrize("row", [row for row in ROWS if row.right], ids=lambda row: row.what)
def test_a_rank_that_makes_it_alone_stops_the_others(row):
    simulator = Simulator(W)

    def work(transport):
        cp = df.ContextParallel(transport)
        return told(row.call if cp.rank == 1 else row.right, cp)

    (_, right), (_, wrong) = simulator.run(work)
    assert re.match(row.words, wrong) and re.match(".*rank 1 refused|token_count: a rank refused", right), right
    assert simulator.traffic.messages == 0
