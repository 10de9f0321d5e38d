"""Exchange of texts between ranks, and propagation of errors."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from distflash.rank_texts import RankTexts
from distflash.transport import Distributed, Simulator
from distflash.transport.simulated import SimulatedTransport


def exchanged():
    """Runs as a rank: two instances of one name do not see each other's texts."""
    ranks = Distributed(dist.group.WORLD)
    return [RankTexts(ranks, "test").exchange(f"{n}: {ranks.rank}") for n in range(2)]


def test_everyone_gets_every_text(ranks_of):
    expected = [[f"{n}: {rank}" for rank in range(3)] for n in range(2)]
    assert ranks_of(3).run(exchanged) == [expected] * 3


def interrupted(kind, words):
    """Runs as a rank: the second raises where the others meet."""
    ranks, released, start = Distributed(dist.group.WORLD), [], time.monotonic()
    texts = RankTexts(ranks, "test", release=released.append)
    with pytest.raises((RuntimeError, ValueError, OSError)) as error, texts.sharing_errors():
        if ranks.rank == 1:
            raise kind(words)
        texts.exchange("")
    assert not released and time.monotonic() - start < 10  # all have noticed by themselves
    return type(error.value), str(error.value)


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_the_words_of_a_rank_that_raises_reach_the_others(kind, ranks_of):
    first, second, third = ranks_of(3).run(interrupted, kind, "no more tokens")
    assert second == (kind, "no more tokens")
    for other, (seen, words) in ((0, first), (2, third)):
        assert seen is (ValueError if kind is ValueError else RuntimeError)
        assert words == f"test: rank 1 raised {kind.__name__}: no more tokens. This is rank {other}, which stops"


def absent():
    """Runs as a rank: the last one never comes."""
    ranks = Distributed(dist.group.WORLD)
    texts = RankTexts(ranks, "test", patience=0.5)
    if ranks.rank == 0:
        with pytest.raises(RuntimeError, match=r"test: some rank did not come within 0\.5 s"):
            texts.exchange("")
    return True


def test_a_rank_that_never_comes_is_given_up(ranks_of):
    assert ranks_of(2).run(absent) == [True, True]


class EndsWithRank0:
    """A store in the process of rank 0: whoever asks it after rank 0 has ended gets an error. The last rank is slow."""

    def __init__(self):
        self.inner, self.ended = dist.HashStore(), False

    def request(self, slow, name, *arguments):
        if slow:
            time.sleep(0.1)
        if self.ended:
            raise dist.DistNetworkError("Connection reset by peer")
        return getattr(self.inner, name)(*arguments)

    def of(self, slow):
        requests = {name: partial(self.request, slow, name) for name in ("set", "get", "check")}
        return SimpleNamespace(**requests)


def on_ranks(count, work):
    """The ranks' ``work``, in threads, with a store that ends with rank 0: results, or errors."""
    store, simulator = EndsWithRank0(), Simulator(count)

    def one(rank):
        texts = RankTexts(SimulatedTransport(simulator, rank), "test")
        texts._store = store.of(slow=rank == count - 1)
        try:
            return work(texts, rank)
        except Exception as error:
            return error
        finally:
            store.ended = store.ended or rank == 0

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_the_rank_with_the_store_may_end_after_an_exchange():
    assert on_ranks(3, lambda texts, rank: texts.exchange(f"of {rank}")) == [["of 0", "of 1", "of 2"]] * 3


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}], ids=str)
def test_the_rank_with_the_store_may_end_after_a_failure(failing):
    def work(texts, rank):
        with texts.sharing_errors():
            if rank in failing:
                raise ValueError(f"of {rank}")
            if rank == 2:
                time.sleep(0.3)  # it comes when the others have raised
            texts.exchange("")

    for error in on_ranks(3, work):
        assert type(error) is ValueError and any(f"of {rank}" in str(error) for rank in failing)


class FailsAfterwards(dist.HashStore):
    """A store in which rank 1 comes to the exchange just after rank 0 looked for it, and then fails at once."""

    def check(self, keys):
        done = super().check(keys)
        if not done and len(keys) > 1:
            self.set(keys[1], "came")
            self.set(f"{keys[1].rsplit('/', 2)[0]}/failed", '[1, "ValueError: later"]')
        return done


def test_an_exchange_that_all_came_to_is_not_undone_by_a_later_error():
    texts = RankTexts(SimulatedTransport(Simulator(2), 0), "test")
    texts._store = FailsAfterwards()
    assert texts.exchange("came first") == ["came first", "came"]
    with pytest.raises(ValueError, match="rank 1 raised ValueError: later"):
        texts.exchange("again")
