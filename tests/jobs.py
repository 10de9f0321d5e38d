"""Commands as users start them, for tests: all ranks in one session, so that a hang ends with all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def start(*command: object, **env: str) -> subprocess.Popen[str]:
    """Start a command in the repository's root, a core a process; its outputs come together."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str], expected: int = 0, timeout: float = 60) -> str:
    """Wait for the job and return what it printed; a hang or another exit code fails with that text."""
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        pytest.fail(f"no end after {timeout} s:\n{output}")
    assert job.returncode == expected, f"exit code {job.returncode} instead of {expected}:\n{output}"
    return output
