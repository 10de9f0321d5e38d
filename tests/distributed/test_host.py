"""The command that runs all multi-GPU benchmarks of a host, on two CPU processes."""

import json

import pytest

from tests import forked
from tests.jobs import ROOT, finish, start

RECORDS = tuple(f"ring-{what}-2" for what in ("causal", "64", "192", "window4096", "documents", "longest"))

pytest.importorskip("matplotlib")


@pytest.mark.timeout(600)
def test_every_step_passes_and_leaves_its_record(tmp_path):
    for name in RECORDS:
        (ROOT / "runs/host" / f"{name}.json").unlink(missing_ok=True)
    with forked.python(tmp_path, timeout=250, CUDA_VISIBLE_DEVICES="") as python:
        job = start("bash", "benchmarks/host.sh", 2, DISTFLASH_PYTHON=str(python), CUDA_VISIBLE_DEVICES="")
        assert "the main job takes 512 tokens on 2 ranks" in finish(job, timeout=300)
    for name in RECORDS:
        for row in json.loads((ROOT / "runs/host" / f"{name}.json").read_text())["rows"]:
            ring, single = (max(row["errors"][who].values()) for who in ("ring", "single"))
            assert 0 < ring < 2 * single  # of random data, of as much work a rank, in the same precision
