"""One rank fails, in every phase of a call; all others raise one error that says why, in time."""

import re

import pytest
import torch

from tests import faults
from tests.faults import FAULTY, TIMEOUT, Ending

# Seconds. A rank that is gone, or that raised, is noticed at once; then the ranks give one another a second.
AT_ONCE = 8.0

ALL = [(ranks, *case) for ranks in (2, 3, 4) for case in faults.cases(ranks)]
# Each case once, with numbers of ranks in turn.
SOME = [(2 + n % 3, *case) for n, case in enumerate(faults.cases(3))]


def pytest_generate_tests(metafunc):
    if "fault" in metafunc.fixturenames:
        chosen = ALL if metafunc.config.getoption("--full") else SOME
        metafunc.parametrize(("ranks", "phase", "fault"), chosen, ids=lambda value: str(value).replace(" ", "_"))


def check_error(ending: Ending, phase: faults.Phase, fault: str) -> None:
    assert ending.error is not None
    kind, words, failed, cause = ending.error
    assert kind == "RankFailure" and failed == (FAULTY,) and cause == "RuntimeError"
    assert re.search(phase.said, words)
    if fault == "raises":
        assert re.match(
            r"rank 1 raised in call \d, (for|back)ward of q .*, ZeroDivisionError: one over nothing\.", words
        )
    else:
        assert "Nothing was heard of rank 1" in words
    assert ("nothing came" in words) == (fault == "hangs")
    again, more_words, seconds = ending.again
    assert again == "RankFailure" and "has failed before" in more_words and words in more_words and seconds < 0.5
    assert not ending.threads


@pytest.mark.timeout(60)
def test_every_other_rank_says_why(ranks, phase, fault):
    replies = faults.endings(ranks, phase, fault)
    where = faults.phases(ranks)[phase]
    others = faults.survivors(replies)
    assert len(others) == ranks - 1
    if fault == "is late":
        for rank, gradient in enumerate(faults.expected(ranks, phase)):
            assert replies[rank].value.error is None
            torch.testing.assert_close(replies[rank].value.result, gradient)
        return
    for ending in others:
        check_error(ending, where, fault)
    limit = AT_ONCE + (TIMEOUT if fault == "hangs" else 0)
    assert max(ending.seconds for ending in others) < limit
    check_the_faulty(replies[FAULTY], fault)


def check_the_faulty(reply, fault):
    if fault in ("killed", "exits"):
        assert reply.value == f"died with exit code {-9 if fault == 'killed' else 1}"
    elif fault == "raises":  # its own error, and no call after it
        assert reply.value.error[0] == "ZeroDivisionError" and reply.value.again[0] == "RankFailure"
    else:  # it comes back too late
        assert reply.value.error[0] == "RankFailure"
