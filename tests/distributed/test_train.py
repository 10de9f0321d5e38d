"""The main job on real ranks, as users start it: a tiny model, and a length not divisible by the ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from distflash.recipes import trainer
from distflash.recipes.config import TrainConfig
from distflash.recipes.options import parse
from tests import forked, jobs
from tests.jobs import finish, rank_process, torchrun, wait_until
from tests.ranks import Ranks
from tests.trained_run import Ended, as_rank

pytestmark = pytest.mark.timeout(300)

STEPS = 6
MODEL = ("--layers", "2", "--dim", "32", "--heads", "4", "--kv-heads", "2")
TINY = (*MODEL, "--device", "cpu", "--seq-len", "193", "--batch-size", "2", "--warmup", "2", "--lr", "1e-2")

# A step's loss goes through a few roundings whose order depends on the ranks, and each optimizer step hands on those of
# the one before: 4 eps a step. A token that is lost or counted twice changes the loss by 1e-3 and more.
TOLERANCE = 4 * STEPS * torch.finfo(torch.float32).eps


RanksOf = Callable[[int], Ranks]


def start(ranks: int, *options: object, out: Path) -> subprocess.Popen[str]:
    """Start the job as users do: plain Python on one rank, torchrun on more."""
    launcher = torchrun(ranks) if ranks > 1 else [sys.executable]
    return jobs.start(*launcher, "launch/train.py", *TINY, "--out", out, *options)


def as_command(ranks: int, *options: object, out: Path) -> str:
    return finish(start(ranks, *options, out=out))


def on_ranks(ranks: Ranks, *options: object, out: Path) -> list[Ended]:
    """The job on ranks that are there, which does not load torch again."""
    words = [str(word) for word in (*TINY, "--out", out, *options)]
    return ranks.run(job_on_rank, parse(TrainConfig, words))


def job_on_rank(config: TrainConfig) -> Ended:
    """Runs as a rank."""
    return as_rank(lambda config, device: trainer.train(config, trainer.agree(config), device), config)


def train(ranks: Ranks, *options: object, out: Path) -> str:
    """What the first rank prints of a job that ends well on all of them."""
    ended = on_ranks(ranks, *options, out=out)
    assert [rank.code for rank in ended] == [0] * ranks.count, ended[0].errors
    assert not any(rank.out for rank in ended[1:])
    return ended[0].out


def losses(out: Path) -> list[float]:
    """The losses of steps 1, 2, ...; a step that is missing or made twice fails."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    return [m["loss"] for m in metrics]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank without a launcher, with checkpoints after steps 3 and 6."""
    out = tmp_path_factory.mktemp("one-rank")
    as_command(1, "--steps", STEPS, "--checkpoint-every", 3, out=out)
    return out


def test_one_rank_learns_and_leaves_its_results(one_rank: Path) -> None:
    curve = losses(one_rank)
    assert len(curve) == STEPS
    assert curve[-1] < curve[0] - 0.3
    assert (one_rank / "loss.png").stat().st_size > 10_000
    assert checkpoints(one_rank) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(("ranks", "layout"), [(2, "zigzag"), (3, "striped"), (4, "contiguous")])
def test_same_seed_same_losses_on_any_number_of_ranks(
    ranks: int, layout: str, one_rank: Path, tmp_path: Path, ranks_of: RanksOf
) -> None:
    options = ("--steps", STEPS, "--layout", layout, "--verify")
    output = as_command(2, *options, out=tmp_path) if ranks == 2 else train(ranks_of(ranks), *options, out=tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(one_rank), rel=TOLERANCE)
    largest = re.search(r"verified: .* in (\d+) values; the largest error is ([\d.]+) of its bound", output)
    assert largest is not None and "NOT VERIFIED" not in output
    assert int(largest[1]) >= 23 and float(largest[2]) < 1  # the loss, the output and 21 gradients


def test_resumes_on_another_number_of_ranks(one_rank: Path, tmp_path: Path, ranks_of: RanksOf) -> None:
    out = tmp_path / "run"
    shutil.copytree(one_rank, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    torn = out / "checkpoints" / ".writing-step-00000006"  # as a write leaves it that was killed half-way
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    options = ("--steps", STEPS, "--resume", "--layout", "contiguous", "--checkpoint-activations")
    output = train(ranks_of(3), *options, out=out)
    assert "resumed after step 3" in output
    assert losses(out) == pytest.approx(losses(one_rank), rel=TOLERANCE)
    assert checkpoints(out) == ["step-00000003", "step-00000006"]


def weights(checkpoint: Path, like: Path) -> torch.Tensor:
    """All weights of a checkpoint, flat, whatever ranks wrote it; their shapes are those of `like`, of one rank."""
    (alone,) = like.glob("*.safetensors")
    state = {name: torch.empty_like(x) for name, x in load_file(alone).items() if name.startswith("model.")}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_data_parallel_groups_and_fsdp_go_on_alike(one_rank: Path, tmp_path: Path, ranks_of: RanksOf) -> None:
    """Two groups of two ranks, with all weights sharded over the four, from the checkpoint of one rank."""
    out = tmp_path / "run"
    shutil.copytree(one_rank, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    options = ("--data-parallel", 2, "--fsdp", "--checkpoint-activations", "--resume", "--verify")
    output = train(ranks_of(4), "--steps", STEPS, *options, out=out)
    assert "resumed after step 3" in output and "verified:" in output and "NOT VERIFIED" not in output
    assert losses(out) == pytest.approx(losses(one_rank), rel=TOLERANCE)
    last = "checkpoints/step-00000006"
    mine, plain = (weights(run / last, like=one_rank / last) for run in (out, one_rank))
    assert (mine - plain).norm() <= TOLERANCE * plain.norm()


def test_ranks_that_do_not_divide_into_groups_are_refused(tmp_path: Path, ranks_of: RanksOf) -> None:
    first, second = on_ranks(ranks_of(2), "--data-parallel", 3, "--batch-size", 3, out=tmp_path)
    assert (first.code, second.code) == (2, 2) and not second.errors
    assert "error (rank 0): --data-parallel: got 3, expected a divisor of the 2 ranks" in first.errors


def test_sigterm_to_one_rank_saves_on_all_and_resumes(tmp_path: Path, ranks_of: RanksOf) -> None:
    job = start(2, "--steps", 100_000, out=tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and bool(metrics.read_text()), job)
    os.kill(rank_process(job, 1), signal.SIGTERM)
    assert "stopped by a signal" in finish(job)

    made = len(losses(tmp_path))
    assert checkpoints(tmp_path) == [f"step-{made:08d}"]
    output = train(ranks_of(1), "--steps", made + 2, "--resume", out=tmp_path)
    assert f"resumed after step {made}" in output
    assert len(losses(tmp_path)) == made + 2


def test_data_shorter_than_a_sequence_is_refused_on_all_ranks(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    output = forked.finish(2, "launch/train.py", *TINY, "--data", text, "--out", tmp_path / "run", expected=2)
    assert "error (rank 0): --seq-len: 193 tokens need 194 bytes of text" in output
    assert "set --seq-len to at most 9" in output
    assert "Traceback" not in output


def test_bad_options_are_refused_by_name(tmp_path: Path) -> None:
    output = finish(start(1, "--kv-heads", 3, out=tmp_path), expected=2)
    assert "--kv-heads: got 3 for 4 query heads" in output and "Traceback" not in output
