"""Evaluation on one and several ranks, in chunks through the cache, against whole sequences in float64."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distflash.recipes import evaluator, manifest
from distflash.recipes.data import open_held_out
from distflash.recipes.inference_config import EvaluateConfig
from distflash.recipes.weights import WRITER
from tests import forked
from tests.trained_run import SEQ_LEN, TEXT, Ended, as_rank, load_alone

pytestmark = pytest.mark.timeout(300)

SEQUENCES, LENGTH = 3, 401
CONFIG = EvaluateConfig(seq_len=LENGTH, sequences=SEQUENCES, chunk=150, device="cpu")


def evaluate(config: EvaluateConfig) -> Ended:
    """Runs as a rank."""
    return as_rank(evaluator.evaluate, config)


def evaluate_texts_that_differ(config: EvaluateConfig) -> Ended:
    path = config.held_out
    assert path is not None
    return evaluate(replace(config, held_out=path.with_name(f"{path.stem}{dist.get_rank()}.txt")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of the training from elsewhere, and what the model has not seen."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT[50:600] + "".join(chr(33 + (7 * n * n) % 90) for n in range(2000)))
    return path


@dataclass(frozen=True)
class Reference:
    """Bits of predictions [sequences, LENGTH], of whole sequences on one device."""

    exact: torch.Tensor
    single: torch.Tensor


@cache
@torch.no_grad()
def reference(run: Path, text: Path) -> Reference:
    content = text.read_bytes() + b"\0"
    assert open_held_out(text, LENGTH).size == len(content)
    starts = [n * (len(content) - LENGTH - 1) // (SEQUENCES - 1) for n in range(SEQUENCES)]
    windows = torch.tensor([list(content[start : start + LENGTH + 1]) for start in starts])

    def bits(dtype: torch.dtype) -> torch.Tensor:
        logits = load_alone(run, dtype)(windows[:, :-1], LENGTH).log_softmax(-1)
        return -logits.gather(2, windows[:, 1:, None])[..., 0].double() / log(2)

    return Reference(bits(torch.float64), bits(torch.float32))


@pytest.mark.parametrize(
    ("ranks", "change"),
    [
        (1, {}),
        (1, dict(chunk=LENGTH)),
        (2, {}),
        (2, dict(chunk=29)),
        (3, dict(chunk=64, layout="striped")),
        (3, dict(chunk=10_000, layout="contiguous")),
    ],
)
def test_any_ranks_and_chunks_give_what_whole_sequences_give(
    ranks: int, change: dict, trained: Path, text: Path, tmp_path: Path, ranks_of
) -> None:
    config = replace(CONFIG, checkpoint=trained, held_out=text, out=tmp_path, **change)
    ended = ranks_of(ranks).run(evaluate, config)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].errors
    assert all(rank == Ended(0, "", "") for rank in ended[1:])
    result, truth = json.loads((tmp_path / "evaluation.json").read_text()), reference(trained, text)
    # Rounding of the same model in the same precision on one device, of a single prediction at worst.
    bound = 4 * float((truth.single - truth.exact).abs().max())
    assert bound < 1e-3
    ranges = result["by_context"]
    assert [r["first"] for r in ranges[1:]] == [r["last"] + 1 for r in ranges[:-1]]
    assert (ranges[0]["first"], ranges[-1]["last"]) == (1, LENGTH) and SEQ_LEN in [r["last"] for r in ranges]
    for r in ranges:
        expected = truth.exact[:, r["first"] - 1 : r["last"]].mean(1)
        assert r["bits"] == pytest.approx(float(expected.mean()), abs=bound), r
        assert r["error"] == pytest.approx(float(expected.std() / SEQUENCES**0.5), abs=bound), r
    for name, part in [
        ("bits_per_byte", truth.exact),
        ("bits_per_byte_within_training_length", truth.exact[:, :SEQ_LEN]),
        ("bits_per_byte_beyond_training_length", truth.exact[:, SEQ_LEN:]),
    ]:
        assert result[name] == pytest.approx(float(part.mean()), abs=bound)
    assert (result["ranks"], result["step"], result["trained_seq_len"]) == (ranks, 120, SEQ_LEN)
    assert f"bits per byte: {result['bits_per_byte']:.3f} +- " in ended[0].out
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


def test_refused_on_every_rank(trained: Path, text: Path, tmp_path: Path, ranks_of) -> None:
    config = replace(CONFIG, checkpoint=trained, held_out=text, out=tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "text0.txt").write_text("x" * 500)
    (tmp_path / "text1.txt").write_text("x" * 501)
    for work, change, words in [
        (evaluate, dict(seq_len=10_000), "--seq-len: 10000 tokens need 10001 bytes of text"),
        (evaluate, dict(held_out=tmp_path / "nowhere"), "--held-out: "),
        (evaluate, dict(out=tmp_path / "file"), "is no folder"),
        (evaluate_texts_that_differ, dict(held_out=tmp_path / "text.txt"), "--held-out: file names or sizes differ"),
    ]:
        first, second = ranks_of(2).run(work, replace(config, **change))
        assert (first.code, second.code) == (2, 2) and first.out == second.errors == ""
        assert first.errors.count("\n") == 1 and words in first.errors


def test_a_checkpoint_that_does_not_say_its_length(trained: Path, text: Path, tmp_path: Path, ranks_of) -> None:
    """As those of earlier versions."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    newest = run / "checkpoints" / "step-00000120"
    model = json.loads((newest / "model.json").read_text())
    assert model.pop("seq_len") == SEQ_LEN
    (newest / "model.json").write_text(json.dumps(model))
    manifest.seal(newest, WRITER, 120)
    config = replace(CONFIG, checkpoint=run, held_out=text)
    for told in (None, 100):  # no length of training makes that of the sequences
        refused = ranks_of(2).run(evaluate, replace(config, seq_len=None, trained_seq_len=told))
        assert [rank.code for rank in refused] == [2, 2] and "give --seq-len" in refused[0].errors
    assert ranks_of(2).run(evaluate, config)[0].code == 0
    result = json.loads((run / "evaluation.json").read_text())  # beside the run's other results, by default
    assert result["trained_seq_len"] is None and result["bits_per_byte_within_training_length"] is None
    assert ranks_of(2).run(evaluate, replace(config, trained_seq_len=100))[0].code == 0
    assert 100 in [r["last"] for r in json.loads((run / "evaluation.json").read_text())["by_context"]]


def test_another_length_of_training_than_the_checkpoints_is_refused(trained: Path, text: Path, ranks_of) -> None:
    config = replace(CONFIG, checkpoint=trained, held_out=text, trained_seq_len=10**6)
    refused = ranks_of(2).run(evaluate, config)
    assert [rank.code for rank in refused] == [2, 2]
    assert f"--trained-seq-len: got 1000000, but {trained}" in refused[0].errors
    assert f"was trained with {SEQ_LEN}; leave it out" in refused[0].errors


def test_as_a_command(trained: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", trained, "--sequences", 2, "--device", "cpu", "--out", tmp_path)
    output = forked.finish(2, "launch/evaluate.py", *options)
    assert f"trained with {SEQ_LEN} bytes a sequence" in output and "bits per byte: " in output
    assert json.loads((tmp_path / "evaluation.json").read_text())["seq_len"] == 2 * SEQ_LEN
