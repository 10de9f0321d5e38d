"""The one command for all that the ring has to show on a host, as its rehearsal on two CPU processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ("ring-causal-2", "ring-window4096-2", "ring-documents-2", "ring-longest-2")

pytest.importorskip("matplotlib")


def host(ranks: int, timeout: float) -> tuple[int, str]:
    """Its exit code and what it printed; a hang fails with that text."""
    job = subprocess.Popen(
        ["bash", "benchmarks/host.sh", str(ranks)],
        cwd=ROOT,
        env={**os.environ, "DISTFLASH_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        pytest.fail(f"no end after {timeout} s:\n{output}")
    return job.returncode, output


@pytest.mark.timeout(360)
def test_every_step_passes_and_leaves_its_record():
    for name in RECORDS:
        (ROOT / "runs/host" / f"{name}.json").unlink(missing_ok=True)
    code, output = host(2, timeout=300)
    assert code == 0, output
    assert "the main job takes 512 tokens on 2 ranks" in output
    for name in RECORDS:
        for row in json.loads((ROOT / "runs/host" / f"{name}.json").read_text())["rows"]:
            ring, single = (max(row["errors"][who].values()) for who in ("ring", "single"))
            assert 0 < ring < 2 * single  # of random data, of as much work a rank, in the same precision
