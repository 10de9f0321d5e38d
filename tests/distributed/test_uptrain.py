"""Uptraining over ranks: pooled and unchanged weights, reset moments, and equality with one rank."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from distflash.recipes import manifest, trainer, uptraining
from distflash.recipes.config import ModelConfig, OptimizerConfig, TrainConfig
from distflash.recipes.together import end
from distflash.recipes.uptrain_config import UptrainConfig
from tests import forked

pytestmark = pytest.mark.timeout(400)

# No number of ranks divides the length; 4 heads of 4 channels, of which a rank of FSDP's has uneven parts.
HEADS, HEAD_DIM, DIM, LAYERS = 4, 4, 16, 2
STEPS, SHARE = 10, 0.4  # 4 steps of uptraining
RUN = dict(device="cpu", seq_len=65, batch_size=2)
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup=1)
TOLERANCE = 4 * STEPS * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, and the lines that it printed as errors."""

    code: int
    lines: list[str]


def ended(work) -> Ended:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = end(work)
    return Ended(code, errors.getvalue().splitlines())


def train(out: Path, options: dict) -> Ended:
    """Runs as a rank."""
    model = ModelConfig(layers=LAYERS, dim=DIM, heads=HEADS, kv_heads=HEADS)
    config = TrainConfig(**{**RUN, "out": out, "steps": STEPS, "model": model, "optimizer": OPTIMIZER, **options})
    return ended(lambda: trainer.train(config, trainer.agree(config), torch.device("cpu")))


def uptrain(source: Path, out: Path, options: dict) -> Ended:
    """Runs as a rank."""
    asked = {"source": source, "out": out, "kv_heads": 2, "share": SHARE, "optimizer": OPTIMIZER, **RUN, **options}
    config = UptrainConfig(**asked)
    return ended(lambda: uptraining.uptrain(config, trainer.agree(config), torch.device("cpu")))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: Path, like: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint whole, whatever ranks wrote it; their shapes are those of `like`, of one rank."""
    (alone,) = like.glob("*.safetensors")
    with safe_open(alone, framework="pt") as file:
        state = {name: torch.full_like(file.get_tensor(name), torch.nan) for name in file.keys()}  # noqa: SIM118
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


@pytest.fixture(scope="module")
def source(ranks_of, tmp_path_factory) -> Path:
    """A run of one rank."""
    out = tmp_path_factory.mktemp("source")
    assert ranks_of(1).run(train, out, {}) == [Ended(0, [])]
    return out


@pytest.fixture(scope="module")
def alone(source: Path, ranks_of, tmp_path_factory) -> Path:
    """Uptrained on one rank, with the loss of held-out text."""
    out = tmp_path_factory.mktemp("alone")
    held_out = {"held_out": Path(uptraining.__file__).parent, "held_out_batches": 2, "held_out_points": 2}
    assert ranks_of(1).run(uptrain, source, out, {"keep_checkpoints": 5, **held_out}) == [Ended(0, [])]
    return out


def mean_of_groups(x: torch.Tensor) -> torch.Tensor:
    heads = x.double().split(HEAD_DIM)
    return torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])


def first_of_groups(x: torch.Tensor) -> torch.Tensor:
    heads = x.double().split(HEAD_DIM)
    return torch.cat([heads[0], heads[2]])


def is_changed(name: str) -> bool:
    return "attention.k_proj" in name or "attention.v_proj" in name


def test_the_first_checkpoint_has_pooled_heads_and_all_else_as_it_was(source: Path, alone: Path) -> None:
    before = state_of(checkpoint(source, STEPS), checkpoint(source, STEPS))
    after = state_of(checkpoint(alone, 0), checkpoint(alone, 0))
    assert before.keys() == after.keys()
    changed = [name for name in before if is_changed(name)]
    assert len(changed) == 2 * LAYERS * 4  # a weight, two moments and a count of steps each
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - set(changed))
    for name in changed:
        if name.startswith("model."):
            assert torch.equal(after[name], mean_of_groups(before[name]).float()), name
            assert not torch.equal(after[name], first_of_groups(before[name]).float())
        else:
            assert before[name].abs().max() > 0 and after[name].abs().max() == 0, name
    steps = {float(x) for name, x in after.items() if name.endswith(".step") and not is_changed(name)}
    assert steps == {STEPS}


def test_it_is_a_checkpoint_of_the_main_job_that_goes_on(alone: Path) -> None:
    last = state_of(checkpoint(alone, 4), checkpoint(alone, 4))
    counts = {is_changed(name): float(x) for name, x in last.items() if name.endswith(".step")}
    assert counts == {True: 4, False: STEPS + 4}
    assert json.loads((checkpoint(alone, 4) / "model.json").read_text())["kv_heads"] == 2
    assert len(losses(alone)) == 4


def test_the_loss_of_held_out_text_is_kept(alone: Path) -> None:
    curve = json.loads((alone / "held_out.json").read_text())
    assert list(curve) == ["0", "2", "4"] and curve["4"] < curve["0"]


@pytest.mark.parametrize("fsdp", [True, False])
@pytest.mark.parametrize("method", ["mean", "random"])
def test_two_ranks_are_one(fsdp: bool, method: str, source: Path, alone: Path, tmp_path: Path, ranks_of) -> None:
    """From the checkpoint of two ranks, sharded the other way round."""
    whole = alone
    if method != "mean":
        whole = tmp_path / "whole"
        assert ranks_of(1).run(uptrain, source, whole, {"method": method, "keep_checkpoints": 5}) == [Ended(0, [])]
    again, out = tmp_path / "again", tmp_path / "out"
    shutil.copytree(source, again)
    assert {each.code for each in ranks_of(2).run(train, again, {"resume": True, "steps": STEPS, "fsdp": fsdp})} == {0}
    options = {"method": method, "fsdp": fsdp, "layout": "striped", "keep_checkpoints": 5}
    if method == "mean":
        options |= {"held_out": Path(uptraining.__file__).parent, "held_out_batches": 2, "held_out_points": 2}
    assert {each.code for each in ranks_of(2).run(uptrain, source, out, options)} == {0}
    assert losses(out) == pytest.approx(losses(whole), rel=TOLERANCE)
    first = state_of(checkpoint(out, 0), checkpoint(whole, 0))
    assert all(torch.equal(x, first[name]) for name, x in state_of(checkpoint(whole, 0), checkpoint(whole, 0)).items())
    if method == "mean":
        curves = [json.loads((run / "held_out.json").read_text()) for run in (out, whole)]
        assert curves[0] == pytest.approx(curves[1], rel=TOLERANCE)


def test_a_source_that_is_sharded_is_pooled_whole(source: Path, alone: Path, tmp_path: Path, ranks_of) -> None:
    """Three ranks share 4 heads of 4 rows: of most heads a rank has a part only."""
    written = tmp_path / "written"
    shutil.copytree(source, written)
    shutil.rmtree(written / "checkpoints")
    assert {each.code for each in ranks_of(3).run(train, written, {"fsdp": True})} == {0}
    out = tmp_path / "out"
    assert {each.code for each in ranks_of(2).run(uptrain, written, out, {"keep_checkpoints": 5})} == {0}
    before = state_of(checkpoint(written, STEPS), checkpoint(source, STEPS))
    after = state_of(checkpoint(out, 0), checkpoint(alone, 0))
    for name in before:
        if name.startswith("model."):
            expected = mean_of_groups(before[name]).float() if is_changed(name) else before[name]
            assert torch.equal(after[name], expected), name


def test_goes_on_where_it_was_stopped(source: Path, alone: Path, tmp_path: Path, ranks_of) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    shutil.rmtree(checkpoint(out, 4))  # back to the first one, which is of no step
    assert {each.code for each in ranks_of(2).run(uptrain, source, out, {"resume": True})} == {0}
    assert losses(out) == pytest.approx(losses(alone), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"kv_heads": 4},
            "--kv-heads: got 4, expected a divisor of the source's 4 query heads, and less than its 4 key",
        ),
        ({"kv_heads": 3}, "--kv-heads: got 3"),
        ({"kv_heads": 0}, "--kv-heads: got 0"),
        ({"source": Path("nowhere")}, "--source: got nowhere, expected a run's --out, or a step-\\* folder"),
        ({"held_out": Path("nowhere")}, "--held-out: nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks_before_anything_is_written(
    options: dict, words: str, source: Path, tmp_path: Path, ranks_of
) -> None:
    first, second = ranks_of(2).run(uptrain, source, tmp_path / "out", options)
    assert (first.code, second.code) == (2, 2) and second.lines == []
    assert len(first.lines) == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(first.lines[0])
    assert not (tmp_path / "out").exists()


def test_a_source_is_never_overwritten(source: Path, tmp_path: Path, ranks_of) -> None:
    run = Path(shutil.copytree(source, tmp_path / "run"))
    first, _ = ranks_of(2).run(uptrain, run, run, {"overwrite": True})
    assert first.code == 2 and "--out: got" in first.lines[0] and "would be lost" in first.lines[0]
    assert checkpoint(run, STEPS).exists()


def test_a_damaged_source_and_one_of_another_program_are_refused(source: Path, tmp_path: Path, ranks_of) -> None:
    run = Path(shutil.copytree(source, tmp_path / "run"))
    listed, shape = (checkpoint(run, STEPS) / name for name in ("manifest.json", "model.json"))
    listed.write_text(listed.read_text().replace("launch/train.py", "another"))
    first, _ = ranks_of(2).run(uptrain, run, tmp_path / "out", {})
    assert first.code == 2 and "was written by another; give a checkpoint of launch/train.py" in first.lines[0]
    shape.write_text(shape.read_text() + " ")
    first, _ = ranks_of(2).run(uptrain, run, tmp_path / "out", {})
    assert first.code == 2 and str(shape) in first.lines[0] and "is damaged" in first.lines[0]
    shape.write_text('{"layers": [1]}')
    manifest.seal(checkpoint(run, STEPS), "launch/train.py", STEPS)
    first, _ = ranks_of(2).run(uptrain, run, tmp_path / "out", {})
    assert first.code == 2 and "does not describe a model" in first.lines[0]


def test_the_command_compares_all_methods(source: Path, tmp_path: Path) -> None:
    """As users start it, on two ranks."""
    options = ("--device", "cpu", "--seq-len", 65, "--warmup", 1, "--share", SHARE, "--held-out-batches", 1)
    command = ("launch/uptrain.py", "--source", source, "--kv-heads", 1, "--compare", "--out", tmp_path, *options)
    output = forked.finish(2, *command, timeout=300)
    assert "random heads: held-out loss" in output and "comparison: " in output
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert len(kept["held_out_loss_by_step"]) == 4 and kept["kv_heads"] == {"source": 4, "uptrained": 1}
    at_once = [curve["0"] for curve in kept["held_out_loss_by_step"].values()]
    assert at_once[0] == kept["held_out_loss_of_source"] and len(set(at_once)) == 4
    assert (tmp_path / "compare.png").stat().st_size > 10_000
