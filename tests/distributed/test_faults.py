"""One rank fails, in every phase of a call; all others raise an error with the reason, in time."""

import os
import re
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

import distflash as df
from tests import faults
from tests.faults import FAULTY, TIMEOUT, Ending
from tests.ranks import Ranks

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


@pytest.mark.timeout(120)
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


def mean_over_a_group():
    """Runs as a rank; rank 1 ends. What the other is told by `mean` over all ranks, then over those of the sequence."""
    cp = df.ContextParallel(dist.new_group(), timeout=faults.LONG)
    dist.barrier()
    if cp.rank == FAULTY:
        os._exit(1)
    words = []
    for group in (dist.group.WORLD, None):
        with pytest.raises(df.RankFailure) as failure:
            cp.mean(torch.zeros(()), 1, reduction="sum", group=group)
        words.append(str(failure.value))
    return words


@dataclass(frozen=True)
class FailsToPlan(df.schedules.Schedule):
    """On one rank, once all have agreed on the call: as memory that runs out does."""

    def plan(self, geometry, rank):
        if rank == FAULTY:
            raise MemoryError("no room for a plan")
        return df.Ring().plan(geometry, rank)


def attend_without_a_plan():
    """Runs as a rank. What it is told, and after how long."""
    cp = df.ContextParallel(dist.group.WORLD, schedule=FailsToPlan(), timeout=faults.LONG)
    q, start = torch.zeros(1, 4, 2, 8), time.monotonic()
    with pytest.raises((MemoryError, df.RankFailure)) as failure:
        df.attention(q, q, q, cp=cp)
    return type(failure.value).__name__, str(failure.value), time.monotonic() - start


@pytest.mark.timeout(120)
def test_a_rank_that_raises_before_its_first_message_says_so():
    ranks = Ranks(3, "gloo", timeout=30)
    try:
        replies = ranks.run(attend_without_a_plan)
    finally:
        ranks.stop()
    kind, _, _ = replies.pop(FAULTY)
    assert kind == "MemoryError"
    for kind, words, seconds in replies:
        assert kind == "RankFailure" and words.startswith("rank 1 raised MemoryError: no room for a plan")
        assert seconds < AT_ONCE


@pytest.mark.timeout(120)
def test_a_wider_group_says_why_too():
    ranks = Ranks(2, "gloo", timeout=30)
    try:
        replies = ranks.replies(mean_over_a_group)
    finally:
        ranks.stop()
    assert replies[0].ok, replies[0].value
    for words in replies[0].value:
        assert re.match(
            "rank 0 waited .* for the sum over all ranks .*: a connection is closed. Nothing was heard", words
        )


@pytest.mark.timeout(120)
def test_the_store_may_die_with_its_rank():
    """Where rank 0 keeps the store: the other rank says what it knows itself."""
    ranks = Ranks(2, "gloo", timeout=30)
    try:
        replies = ranks.replies(die_with_the_store)
    finally:
        ranks.stop()
    assert replies[1].ok, replies[1].value
    assert re.match("rank 1 waited .* for all ranks to say .*: a connection is closed$", replies[1].value)


def die_with_the_store():
    rank, address = dist.get_rank(), "127.0.0.1"
    store = dist.TCPStore(address, 0, is_master=True) if rank == 0 else None
    ports = [torch.tensor([store.port if store else 0])]
    dist.broadcast(ports[0], 0)
    store = store or dist.TCPStore(address, int(ports[0]), is_master=False)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    cp = df.ContextParallel(dist.group.WORLD, timeout=faults.LONG)
    dist.barrier()
    if rank == 0:
        os._exit(1)
    x = torch.zeros(1, 4, 1, 4)
    with pytest.raises(df.RankFailure) as failure:
        df.attention(x, x, x, cp=cp)
    return str(failure.value)
