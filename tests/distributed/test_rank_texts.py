"""Exchange of texts between ranks, and propagation of errors."""

import time

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
