"""Reports of failures if waits are asynchronous, as with NCCL, on a fake device."""

import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distflash.transport import Guarded, Message, RankFailure, during
from distflash.transport.distributed import Works

Q = torch.zeros(1, 2, 3, 4)
SOON = 5.0


@dataclass
class Device:
    """A rank as the guard sees it on NCCL: no wait of the host's, and marks that are done when ``done`` is set."""

    rank: int
    store: dist.Store
    timeout: timedelta | None = None
    world_size: int = 2
    device: torch.device = torch.device("cuda")
    verifies_every_call: bool = False
    intra_node: bool = True
    members: tuple[int, ...] = (4, 5)
    done: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    def supports_device(self, device):
        return True

    def exchange(self, sends, receives):
        return Works([Nothing() for _ in sends[:1]], receives, sends, timedelta(0))

    def gather_ints(self, values):
        assert self.closed.wait(SOON)  # as a stream is synchronised: until the communicator is aborted
        return [[0], [0]]

    def mark(self):
        return self.done.is_set

    def close(self):
        self.closed.set()


class Nothing:
    def wait(self, timeout):
        return True


def two_ranks(**options) -> tuple[Device, Device]:
    store = dist.HashStore()
    return Device(0, store, **options), Device(1, store, **options)


def exchange(guarded: Guarded) -> None:
    message = Message(torch.zeros(1), 1 - guarded.rank, "the keys of step 1")
    guarded.exchange([message], [message]).wait()


def test_a_rank_that_raises_ends_what_others_wait_for_on_their_devices():
    one, other = two_ranks(timeout=timedelta(seconds=60))
    raising, waiting = Guarded(one), Guarded(other)
    with during(waiting, "forward", Q):
        exchange(waiting)
    with pytest.raises(ZeroDivisionError), during(raising, "forward", Q):
        raise ZeroDivisionError("one over nothing")
    assert one.closed.is_set() and other.closed.wait(SOON)
    words = (
        r"rank 0 raised in call 1, forward of q \(1, 2, 3, 4\), ZeroDivisionError: one over nothing. Therefore rank 1 "
        r"waited 0.\d s in call 1, forward of q \(1, 2, 3, 4\), for the keys of step 1 from rank 0: nothing came. "
        r"Ranks are those of the context-parallel group, globally \[4, 5\]"
    )
    for use in (lambda: exchange(waiting), lambda: waiting.gather_ints([1]), lambda: waiting.all_reduce(Q)):
        with pytest.raises(RankFailure, match=words) as failure:
            use()
        assert failure.value.failed == (0,)
    with pytest.raises(RankFailure, match=words), during(waiting, "backward", Q):
        pytest.fail("a failed group begins nothing")


def test_at_the_deadline_a_device_is_given_up():
    (one, _) = two_ranks(timeout=timedelta(seconds=0.4))
    guarded = Guarded(one)
    start = time.monotonic()
    exchange(guarded)
    assert one.closed.wait(SOON) and time.monotonic() - start >= 0.4
    with pytest.raises(RankFailure, match=r"rank 0 waited .* s for the keys of step 1 from rank 1: nothing came"):
        exchange(guarded)


def test_a_host_that_waits_for_a_device_is_released_and_what_it_read_is_not_used():
    one, _ = two_ranks(timeout=timedelta(seconds=0.4))
    with pytest.raises(RankFailure, match=r"waited .* s for all ranks to say .*: nothing came"):
        Guarded(one).gather_ints([1])


def test_what_gets_done_ends_the_watch():
    one, _ = two_ranks(timeout=timedelta(seconds=0.4))
    guarded = Guarded(one)
    exchange(guarded)
    one.done.set()
    time.sleep(0.8)
    assert not one.closed.is_set()
    exchange(guarded)


def test_without_a_timeout_nothing_on_a_device_is_watched():
    """Marks cost the host time at every exchange, and would end the capture of a CUDA graph."""
    one, _ = two_ranks()
    one.mark = lambda: pytest.fail("a mark was made")
    exchange(Guarded(one))


def test_an_exchange_of_nothing_is_not_watched():
    one, _ = two_ranks(timeout=timedelta(seconds=0.1))
    guarded = Guarded(one)
    guarded.exchange([], []).wait()
    time.sleep(0.6)
    assert not one.closed.is_set()


class NoStore:
    """A store whose process died."""

    def __getattr__(self, name):
        raise dist.DistNetworkError("the server is gone")


def test_without_a_store_a_rank_says_what_it_knows():
    guarded = Guarded(Device(0, NoStore()))
    with pytest.raises(ZeroDivisionError), during(guarded, "backward", Q):
        raise ZeroDivisionError("one over nothing")
    with pytest.raises(RankFailure, match=r"rank 0 raised in call 1, backward of .* ZeroDivisionError"):
        exchange(guarded)


def test_other_transports_are_not_guarded():
    with pytest.raises(ZeroDivisionError), during(object(), "forward", Q):
        raise ZeroDivisionError
