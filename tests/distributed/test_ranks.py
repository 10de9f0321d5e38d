"""The harness for ranks: whatever a rank does, the call ends and names the rank."""

import os
import time

import pytest
import torch.distributed as dist

from tests.ranks import RankError, Ranks


def raise_on_rank_1():
    if dist.get_rank() == 1:
        raise ZeroDivisionError("one over nothing")


def die_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(60)


def hang_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(60)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("work", "words"),
    [
        (raise_on_rank_1, r"rank 1: Traceback(.|\n)*ZeroDivisionError: one over nothing"),
        (die_on_rank_1, "rank 1: died with exit code 7"),
        (hang_on_rank_1, "rank 1: no answer"),
    ],
)
def test_a_rank_that_fails_is_named_and_the_next_call_works(work, words, monkeypatch):
    monkeypatch.setattr("tests.ranks._GRACE", 0.5)
    ranks = Ranks(2, "gloo", timeout=3)
    try:
        with pytest.raises(RankError, match=words):
            ranks.run(work)
        assert ranks.run(dist.get_rank) == [0, 1]
    finally:
        ranks.stop()
