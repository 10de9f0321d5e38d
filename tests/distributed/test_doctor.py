"""`python -m distflash doctor` as users start it, and a fault on one rank."""

import sys

import pytest
import torch
import torch.distributed as dist

from distflash.doctor import Examination
from distflash.doctor.findings import Finding
from distflash.transport import Distributed
from tests import forked
from tests.jobs import finish, start


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_cpus_nothing_is_wrong(ranks):
    command = ("-m", "distflash", "doctor", "--device", "cpu")
    if ranks == 1:  # without a launcher
        text = finish(start(sys.executable, *command), timeout=300)
    else:
        text = forked.finish(ranks, *command, timeout=300)
    assert text.count("Versions") == 1 and "FAULT" not in text  # one rank prints
    assert "Reference" in text
    assert ("nothing is wrong on 2 ranks" in text) == ("Messages" in text) == (ranks == 2)


def examined():
    """Runs as a rank: the second finds a fault, the third raises."""
    ranks = Distributed(dist.group.WORLD)
    examination = Examination(ranks, torch.device("cpu"), timeout=30.0)

    def check():
        if ranks.rank == 2:
            raise OSError("no such device")
        yield Finding("link", "slow", "mend it" if ranks.rank == 1 else "")

    return examination.section("Links", check), examination.faults


def test_a_fault_on_one_rank_is_every_ranks(ranks_of, capfd):
    assert ranks_of(3).run(examined) == [(False, 2)] * 3
