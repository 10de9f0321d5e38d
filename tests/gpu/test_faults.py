"""A rank that raises or hangs ends the waits of the others on NCCL, where waits are kernels."""

import re

import pytest

from tests import faults
from tests.faults import FAULTY, TIMEOUT


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["raises", "hangs"])
@pytest.mark.parametrize("phase", ["first ring step", "backward, first step"])
def test_the_other_rank_says_why(phase, fault):
    (other,) = faults.survivors(faults.endings(2, phase, fault, backend="nccl"))
    assert other.error is not None
    kind, words, failed, _ = other.error
    assert kind == "RankFailure"
    # A rank whose host hangs still watches its device, and gives up at the same time: nobody can tell who came late.
    assert failed == (FAULTY,) or (fault == "hangs" and failed == ())
    assert re.search(faults.phases(2)[phase].said, words)
    assert ("rank 1 raised" in words) == (fault == "raises")
    assert ("nothing came" in words) and other.again[0] == "RankFailure"
    assert other.seconds < 10 + (TIMEOUT if fault == "hangs" else 0)
