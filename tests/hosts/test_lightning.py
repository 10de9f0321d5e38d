"""The example with Lightning: losses over ranks equal those of one process."""

from importlib.util import find_spec

import pytest

from tests.hosts.runs import call

pytestmark = [
    pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed: bash .ci/hosts"),
    pytest.mark.timeout(300),
]
PRELOAD = "tests.hosts.lightning_runs"


def test_losses_are_as_on_one_process(ranks_of, request):
    (alone,) = ranks_of(1).run(call, PRELOAD, "train", 1)
    assert len(alone) == 6
    # With four ranks there are two data ranks.
    for ranks in (2, 4) if request.config.getoption("--full") else (2,):
        losses = ranks_of(ranks).run(call, PRELOAD, "train", 2)[0]
        assert losses == pytest.approx(alone, rel=1e-6)
