"""The main job on two nodes: two torchrun agents on this machine, with the options of launch/slurm/train.sbatch."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import forked, jobs
from tests.jobs import ROOT, finish, free_port, kill, torchrun_node, wait_until

pytestmark = pytest.mark.timeout(400)

STEPS = 4
# The numbers of a test in place of the command's; all its other options stay as they are.
SMALL = {
    **{"--seq-len": 193, "--steps": STEPS, "--warmup": 2, "--lr": 1e-2, "--checkpoint-every": 2},
    **{"--layers": 2, "--dim": 32, "--heads": 4, "--kv-heads": 2},
}
# As in test_train: a few roundings a step, which each step hands on.
TOLERANCE = 4 * STEPS * torch.finfo(torch.float32).eps
SECONDS = 60  # in which a node has ended after the other one is gone; it takes 2 on a machine that does nothing else


def options(out: Path, **changes: object) -> list[str]:
    """The command's options with small numbers, and the test's folder."""
    script = (ROOT / "launch" / "slurm" / "train.sbatch").read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"^' train (.*) \$resume$", script, re.MULTILINE)[1])
    assert set(SMALL) <= set(words)
    given = SMALL | {f"--{name.replace('_', '-')}": value for name, value in changes.items()} | {"--out": out}
    return [str(given.get(before, word)) for before, word in zip(["", *words], words, strict=False)]


def start_nodes(out: Path, **changes: object) -> list[subprocess.Popen[str]]:
    """Two nodes of two ranks each."""
    command, port = ["launch/train.py", "--device", "cpu", *options(out, **changes)], free_port()
    return [jobs.start(*torchrun_node(node, 2, 2, port), *command) for node in (0, 1)]


def losses(out: Path) -> list[float]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    return [m["loss"] for m in metrics]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes with checkpoints after steps 2 and 4."""
    out = tmp_path_factory.mktemp("two-nodes")
    first, second = start_nodes(out)
    assert f"loss plot: {out}" in finish(first, timeout=200)
    assert "step" not in finish(second, timeout=30)  # rank 0 alone prints
    return out


def test_two_nodes_make_the_losses_of_one_node_with_all_ranks(two_nodes: Path, tmp_path: Path) -> None:
    forked.finish(4, "launch/train.py", "--device", "cpu", *options(tmp_path), timeout=200)
    assert len(losses(tmp_path)) == STEPS
    assert losses(two_nodes) == pytest.approx(losses(tmp_path), rel=TOLERANCE)


def test_one_node_goes_on_where_two_were_stopped(two_nodes: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(two_nodes, tmp_path / "run"))
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    command = ("launch/train.py", "--device", "cpu", *options(out), "--resume")
    assert "resumed after step 2" in forked.finish(2, *command, timeout=200)
    assert losses(out) == pytest.approx(losses(two_nodes), rel=TOLERANCE)


def test_a_node_that_dies_ends_the_other_with_words(tmp_path: Path) -> None:
    first, second = start_nodes(tmp_path, steps=100_000, checkpoint_every=1000)
    metrics = tmp_path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and bool(metrics.read_text()), first, second)
    kill(second)
    output = finish(first, expected=1, timeout=SECONDS)
    # In attention it is this package that says so, elsewhere torch does.
    assert re.search(r"Nothing was heard of ranks? [\d, ]+: dead|Connection (closed|reset) by peer", output), output
