"""Damaged, forged or diverged checkpoints of the main job: what every rank does."""

import contextlib
import io
import json
import pickle
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distflash.recipes import manifest, trainer
from distflash.recipes.config import ModelConfig, OptimizerConfig, TrainConfig
from distflash.recipes.together import end
from tests import jobs
from tests.damage import Attack, flip
from tests.jobs import finish

pytestmark = pytest.mark.timeout(400)

STEPS = 4
# No number of ranks divides the length, and 3 ranks divide no matrix of the model.
CONFIG = TrainConfig(
    device="cpu",
    seq_len=65,
    batch_size=2,
    steps=STEPS,
    checkpoint_every=2,
    model=ModelConfig(layers=1, dim=16, heads=2, kv_heads=1),
    optimizer=OptimizerConfig(lr=1e-2, warmup=1),
)
SHARD = "shard-00002-model-00001-of-00001.safetensors"  # of the second rank
TOLERANCE = 4 * STEPS * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, and the lines that it printed as errors."""

    code: int
    lines: list[str]


def job(out: Path, options: dict) -> Ended:
    """Runs as a rank."""
    options = dict(options)
    optimizer = OptimizerConfig(**{**vars(CONFIG.optimizer), **options.pop("optimizer", {})})
    model = ModelConfig(**{**vars(CONFIG.model), **options.pop("model", {})})
    config = TrainConfig(**{**vars(CONFIG), **options, "out": out, "optimizer": optimizer, "model": model})
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = end(lambda: trainer.train(config, trainer.agree(config), torch.device("cpu")))
    return Ended(code, errors.getvalue().splitlines())


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def moments(checkpoint: Path) -> dict[str, list[torch.Tensor]]:
    """The parts of the optimizer's state by name."""
    parts: dict[str, list[torch.Tensor]] = {}
    for path in checkpoint.glob("*.safetensors"):
        for name, part in load_file(path).items():
            if name.startswith("optimizer."):
                parts.setdefault(name, []).append(part)
    return parts


@pytest.fixture(scope="module")
def whole(ranks_of, tmp_path_factory) -> Path:
    """A run of two ranks with checkpoints after steps 2 and 4."""
    out = tmp_path_factory.mktemp("whole")
    assert [ended.code for ended in ranks_of(2).run(job, out, {})] == [0, 0]
    assert names(out) == ["step-00000002", "step-00000004"]
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def checkpoint(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damages(newest: Path) -> dict[str, tuple[Path, object]]:
    """Of each kind: the file, and what is done to it."""
    shard, shape, listed = (newest / name for name in (SHARD, "model.json", "manifest.json"))
    return {
        "flipped weight": (shard, lambda: flip(shard, 0.9)),
        "flipped header": (shard, lambda: flip(shard, 0.01)),
        "truncated shard": (shard, lambda: shard.write_bytes(shard.read_bytes()[:100])),
        "missing shard": (shard, shard.unlink),
        "foreign shard": (newest / "x.safetensors", lambda: shutil.copy(shard, newest / "x.safetensors")),
        "broken model.json": (shape, lambda: shape.write_text('{"layers": 1')),
        "broken manifest": (listed, lambda: listed.write_text('{"format": 1')),
        "empty manifest": (listed, lambda: listed.write_text("")),
        "manifest of another kind": (listed, lambda: listed.write_text("[]")),
        "missing manifest": (listed, listed.unlink),
    }


@pytest.mark.parametrize("kind", damages(Path()))
def test_a_damaged_checkpoint_is_passed_over_for_the_last_good_one(kind: str, run: Path, whole: Path, ranks_of) -> None:
    file, damage = damages(checkpoint(run))[kind]
    damage()
    first, second = ranks_of(2).run(job, run, {"resume": True})
    assert (first.code, second.code) == (0, 0), first.lines
    assert second.lines == [] and len(first.lines) == 1
    assert str(file) in first.lines[0] and "resumes from step-00000002" in first.lines[0]
    assert names(run) == ["damaged-step-00000004", "step-00000002", "step-00000004"]
    assert losses(run) == pytest.approx(losses(whole), rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["flipped weight", "broken model.json", "missing manifest"])
def test_without_a_good_one_all_ranks_refuse_and_touch_nothing(kind: str, run: Path, ranks_of) -> None:
    shutil.rmtree(checkpoint(run, 2))
    file, damage = damages(checkpoint(run))[kind]
    damage()
    first, second = ranks_of(2).run(job, run, {"resume": True})
    assert (first.code, second.code) == (2, 2)
    assert len(first.lines) == 1 and str(file) in first.lines[0] and "--overwrite or another --out" in first.lines[0]
    assert names(run) == ["step-00000004"]


def reseal(folder: Path) -> None:
    """What somebody does who changes a checkpoint and its digests with it."""
    manifest.seal(folder, manifest.read(folder).writer, STEPS)


def test_no_file_of_a_checkpoint_is_unpickled(run: Path, tmp_path: Path, ranks_of) -> None:
    shutil.rmtree(checkpoint(run, 2))
    mark, good, attacked = tmp_path / "mark", checkpoint(run), 0
    pickle.loads(pickle.dumps(Attack(mark)))
    assert mark.exists(), "the attack does nothing"
    mark.unlink()
    files = [path.name for path in good.iterdir()]
    kept = Path(shutil.copytree(good, tmp_path / "kept"))
    for name in [*files, ".metadata", "__0.metadata", "__0_0.distcp"]:
        shutil.rmtree(good)
        shutil.copytree(kept, good)
        (good / name).write_bytes(pickle.dumps(Attack(mark)))
        if name != "manifest.json":
            reseal(good)
        first, second = ranks_of(2).run(job, run, {"resume": True})
        assert not mark.exists(), f"{name} was unpickled"
        assert first.code == second.code == (2 if name in files else 0), (name, first.lines)
        assert not any("Traceback" in line for line in first.lines)
        attacked += 1
    assert attacked >= 6


@pytest.mark.parametrize("fsdp", [True, False])
def test_what_three_ranks_write_two_read_and_go_on_alike(fsdp: bool, whole: Path, tmp_path: Path, ranks_of) -> None:
    """FSDP shards the one or the other. Without the optimizer's state, the losses of the last step differ by 1e-2."""
    assert {ended.code for ended in ranks_of(3).run(job, tmp_path, {"fsdp": fsdp})} == {0}
    shutil.rmtree(checkpoint(tmp_path, 4))
    resumed = ranks_of(2).run(job, tmp_path, {"fsdp": not fsdp, "resume": True, "layout": "striped"})
    assert {ended.code for ended in resumed} == {0}
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=TOLERANCE)
    state = moments(checkpoint(tmp_path))
    assert state.keys() == moments(checkpoint(whole)).keys() and len(state) == 3 * 12


def test_a_run_that_diverges_stops_on_all_ranks_and_keeps_a_good_checkpoint(run: Path, ranks_of) -> None:
    options = {"resume": True, "steps": 100, "checkpoint_every": 1, "keep_checkpoints": 1, "optimizer": {"lr": 1e30}}
    first, second = ranks_of(2).run(job, run, options)
    assert (first.code, second.code) == (3, 3)
    assert len(first.lines) == 1 and second.lines == []
    assert re.search("step 6: the loss is .* the norm of the gradient nan", first.lines[0]), first.lines
    # The checkpoint of step 5, whose loss was finite, holds weights that are of no use; the one before is still there.
    assert "delete it to go on from step-00000004" in first.lines[0]
    assert names(run) == ["step-00000004", "step-00000005"]
    shutil.rmtree(checkpoint(run, 5))
    assert ranks_of(2).run(job, run, {"steps": 6, "resume": True})[0].code == 0


def test_weights_that_are_not_finite_are_not_written(run: Path, ranks_of) -> None:
    """Infinite after the first step, whose loss and gradient are finite."""
    options = {"resume": True, "steps": 5, "optimizer": {"lr": 1e38, "weight_decay": 1e3}}
    first, second = ranks_of(2).run(job, run, options)
    assert (first.code, second.code) == (3, 3)
    assert "not finite; no checkpoint of it was written" in first.lines[0]
    assert not checkpoint(run, 5).exists()
    assert ranks_of(2).run(job, run, {"resume": True, "steps": 5})[0].code == 0


def make_file(path: Path) -> None:
    path.write_text("a file")


def put_file(path: Path) -> None:
    """In place of the folder that is there."""
    shutil.rmtree(path)
    make_file(path)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "prepare", "remedy"),
    [
        (".", put_file, "is no folder; move it away"),
        ("checkpoints", put_file, "is no folder; move it away"),
        ("metrics.jsonl", put_folder, "is no file; move it away"),
        (
            "metrics.jsonl",
            lambda path: path.write_text('{"step": 1\n' + path.read_text()),
            "line 1 is no step of a run",
        ),
        ("metrics.jsonl", lambda path: path.write_bytes(b"\xff\n"), "repair or remove that line"),
        ("metrics.jsonl", lambda path: path.write_text("[1]\n"), "repair or remove that line"),
    ],
)
def test_what_lies_in_the_way_is_named_on_all_ranks(name: str, prepare, remedy: str, run: Path, ranks_of) -> None:
    prepare(run / name)
    for options in ({"resume": True}, {"overwrite": True}) if remedy.startswith("is no") else ({"resume": True},):
        first, second = ranks_of(2).run(job, run, options)
        assert (first.code, second.code) == (2, 2)
        assert len(first.lines) == 1 and str(run / name) in first.lines[0] and remedy in first.lines[0]


def test_a_copy_beside_the_checkpoints_is_no_checkpoint(run: Path, ranks_of) -> None:
    shutil.copytree(checkpoint(run, 2), run / "checkpoints" / "step-00000009.bak")
    make_file(run / "checkpoints" / "step-00000009")
    first, second = ranks_of(2).run(job, run, {"resume": True, "steps": 5})
    assert (first.code, second.code) == (0, 0), first.lines
    assert names(run) == ["step-00000002", "step-00000004", "step-00000005", "step-00000009", "step-00000009.bak"]


def test_a_checkpoint_of_another_program_is_refused(run: Path, ranks_of) -> None:
    for step in (2, 4):
        path = checkpoint(run, step) / "manifest.json"
        path.write_text(path.read_text().replace("launch/train.py", "another"))
    first, second = ranks_of(2).run(job, run, {"resume": True})
    assert (first.code, second.code) == (2, 2) and "was written by another" in first.lines[0]


def test_any_file_name_is_read(tmp_path: Path, ranks_of) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "caf\udce9.txt").write_text("a text of no great length\n" * 100)
    ended = ranks_of(2).run(job, tmp_path / "run", {"data": data, "steps": 1})
    assert [e.code for e in ended] == [0, 0], ended[0].lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lr", "inf"), "--lr: got inf, expected a positive, finite number"),
        (("--out", "runs/caf\udce9"), "expected a name in UTF-8"),
        (("--data", "nowhere/caf\udce9"), "does not exist"),
    ],
)
def test_refused_at_start_with_exit_code_2(options: tuple[str, ...], words: str) -> None:
    output = finish(jobs.start(sys.executable, "launch/train.py", "--device", "cpu", *options), expected=2, timeout=200)
    assert words in output and "Traceback" not in output
