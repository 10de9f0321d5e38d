"""`distflash` as users start it: it starts ranks, and reports how they ended in one line and an exit code."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.jobs import finish, rank_process, start, wait_until

pytestmark = pytest.mark.timeout(500)

CONSOLE = (sys.executable, "-m", "distflash")
MODEL = ("--layers", 1, "--dim", 16, "--heads", 2, "--kv-heads", 1, "--seq-len", 65, "--batch-size", 1)
TWO = ("--ranks", 2, "--device", "cpu")
ENDLESS = ("--steps", 10**6)


def stepping(out: Path, *options: object) -> subprocess.Popen[str]:
    """A run of two ranks that has made a step."""
    job = start(*CONSOLE, "train", *TWO, *MODEL, "--out", out, *options)
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and bool(metrics.read_text()), job, timeout=300)
    return job


def steps(out: Path) -> int:
    return len((out / "metrics.jsonl").read_text().splitlines())


def test_it_trains_on_ranks_of_its_own_and_verifies_the_weights(tmp_path: Path) -> None:
    output = finish(start(*CONSOLE, "train", *TWO, *MODEL, "--steps", 2, "--verify", "--out", tmp_path), timeout=300)
    assert "ranks: 2" in output and "verified: sharded and unsharded agree" in output
    assert steps(tmp_path) == 2 and (tmp_path / "loss.png").exists()
    assert json.loads((tmp_path / "checkpoints/step-00000002/manifest.json").read_text())["step"] == 2
    assert "*****" not in output and "Warning" not in output  # nothing of the launcher

    before = sorted(tmp_path.rglob("*"))
    verify = (*CONSOLE, "verify", "--ranks", 1, "--device", "cpu", *MODEL, "--out", tmp_path, "--resume")
    output = finish(start(*verify), timeout=300)
    assert "resumed after step 2" in output and "verified:" in output
    assert sorted(tmp_path.rglob("*")) == before and steps(tmp_path) == 2


def test_torchrun_starts_it_too(tmp_path: Path) -> None:
    """Without --ranks, and as verify, which writes nothing."""
    output = forked.finish(2, "-m", "distflash", "verify", *MODEL, "--out", tmp_path / "run", timeout=300)
    assert "ranks: 2" in output and "verified: sharded and unsharded agree" in output
    assert not any(tmp_path.iterdir())


def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    job = start(*CONSOLE, "train", *TWO, *MODEL, "--data", text, "--out", tmp_path / "run")
    lines = finish(job, expected=2, timeout=300).splitlines()
    assert lines[0].startswith("error (rank 0): --seq-len: 65 tokens need 66 bytes of text")
    assert len(lines) == 2 and lines[1] in [f"distflash train: rank {n} ended with exit code 2" for n in (0, 1)]


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    job = stepping(tmp_path, *ENDLESS)
    os.kill(rank_process(job, 1), signal.SIGKILL)
    output = finish(job, expected=137, timeout=250)
    assert output.endswith("distflash train: rank 1 was ended by SIGKILL\n")


def test_ctrl_c_saves_and_ends_with_a_line(tmp_path: Path) -> None:
    job = stepping(tmp_path, *ENDLESS)
    job.send_signal(signal.SIGINT)
    output = finish(job, expected=130, timeout=250)
    assert output.endswith("distflash train: ended by SIGINT\n") and "Traceback" not in output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{steps(tmp_path):08d}"]


def test_a_copied_job_is_a_script(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    finish(start(*CONSOLE, "copy", "train", script))
    script.write_text(script.read_text().replace('"Byte-level decoder, ', '"Mine, ').replace("loss plot: ", "drawn: "))
    output = forked.finish(2, script, *MODEL, "--device", "cpu", "--steps", 2, "--out", tmp_path, timeout=300)
    assert f"drawn: {tmp_path}/loss.png" in output and steps(tmp_path) == 2
