"""NeMo AutoModel works without code of ours, since its models use Transformers' attention registry."""

from importlib.util import find_spec

import pytest

from tests.hosts.runs import call

pytestmark = [
    pytest.mark.skipif(find_spec("nemo_automodel") is None, reason="nemo_automodel is not installed: bash .ci/hosts"),
    pytest.mark.timeout(300),
]
PRELOAD = "tests.hosts.nemo_runs"


def test_a_run_is_as_on_one_process(ranks_of):
    (exact,) = ranks_of(1).run(call, PRELOAD, "train", False)
    for found in ranks_of(2).run(call, PRELOAD, "train", True):
        for name, values in exact.items():
            assert found[name] == pytest.approx(values, rel=1e-5), name
