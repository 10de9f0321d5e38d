"""Parts of generation and evaluation without ranks: options, sampling, decoding of bytes, context bins."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import inf, log, nan
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distflash.recipes.by_context import ByContext, edges_of, plot, table
from distflash.recipes.inference_config import EvaluateConfig, GenerateConfig
from distflash.recipes.options import parse
from distflash.recipes.sampling import ByteText, Sampler


@pytest.mark.parametrize("name", ["train", "generate", "evaluate"])
def test_help_needs_no_torch(name: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", f"launch/{name}.py", "--help"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "--device {auto,cpu,cuda}" in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "tyro" in imported and "torch" not in imported


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GenerateConfig(prompt="a", prompt_file=Path("b")), "--prompt: got --prompt-file beside it"),
        (lambda: GenerateConfig(max_new_tokens=0), "--max-new-tokens: got 0, expected at least 1"),
        (lambda: GenerateConfig(temperature=-1.0), "--temperature: got -1.0"),
        (lambda: GenerateConfig(temperature=inf), "--temperature: got inf"),
        (lambda: GenerateConfig(temperature=nan), "--temperature: got nan"),
        (lambda: GenerateConfig(top_p=0.0), "--top-p: got 0.0, expected a share above 0 and up to 1"),
        (lambda: GenerateConfig(top_p=1.5), "--top-p: got 1.5"),
        (lambda: GenerateConfig(top_p=nan), "--top-p: got nan"),
        (lambda: GenerateConfig(seed=-1), "--seed: got -1"),
        (lambda: GenerateConfig(seed=2**63), "--seed: got 9223372036854775808"),
        (lambda: GenerateConfig(stop=""), "--stop: got no text"),
        (lambda: GenerateConfig(chunk=0), "--chunk: got 0"),
        (lambda: EvaluateConfig(chunk=-1), "--chunk: got -1"),
        (lambda: EvaluateConfig(threads=-1), "--threads: got -1"),
        (lambda: EvaluateConfig(sequences=0), "--sequences: got 0"),
        (lambda: EvaluateConfig(seq_len=0), "--seq-len: got 0"),
        (lambda: EvaluateConfig(trained_seq_len=0), "--trained-seq-len: got 0"),
        (lambda: EvaluateConfig(out=Path("caf\udce9")), r"--out: got caf\\xe9, expected a name in UTF-8"),
    ],
)
def test_options_are_refused_by_name(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=words):
        make()


def test_options_are_read_from_a_command_line() -> None:
    config = parse(GenerateConfig, ["--prompt", "def ", "--top-p", "0.5", "--device", "cpu", "--stop", "\n"])
    assert config == GenerateConfig(prompt="def ", top_p=0.5, device="cpu", stop="\n")
    assert parse(EvaluateConfig, ["--seq-len", "77"]) == EvaluateConfig(seq_len=77)


def sampler(temperature: float, top_p: float, seed: int = 0) -> Sampler:
    return Sampler(temperature, top_p, torch.Generator().manual_seed(seed))


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def shares(draws: Sampler, count: int = 4000) -> torch.Tensor:
    drawn = torch.tensor([draws.draw(PROBABILITIES.log()) for _ in range(count)])
    return torch.bincount(drawn, minlength=len(PROBABILITIES)) / count


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBABILITIES),
        (0.5, 1.0, PROBABILITIES**2),
        (1.0, 0.8, PROBABILITIES * torch.tensor([0, 1, 0, 1, 1])),  # 0.4 + 0.3 are less than 0.8
        (1.0, 0.65, PROBABILITIES * torch.tensor([0, 1, 0, 1, 0])),
        (1.0, 1e-9, torch.eye(5)[1]),
        (0.0, 1.0, torch.eye(5)[1]),
    ],
)
def test_what_is_drawn_is_of_the_nucleus(temperature: float, top_p: float, expected: torch.Tensor) -> None:
    expected = expected / expected.sum()
    found = shares(sampler(temperature, top_p))
    assert torch.equal(found > 0, expected > 0)
    # Five standard deviations of a share of 4000 draws.
    assert (found - expected).abs().max() <= 5 * (0.25 / 4000) ** 0.5


def test_a_seed_repeats_what_is_drawn() -> None:
    first, again, other = (
        [draws.draw(PROBABILITIES.log()) for _ in range(50)]
        for draws in (sampler(1.0, 1.0), sampler(1.0, 1.0), sampler(1.0, 1.0, seed=1))
    )
    assert first == again != other


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_characters_come_whole(text: str) -> None:
    shown = ByteText()
    pieces = [shown.add(byte) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text) and shown.rest() == ""


@given(st.binary(max_size=30))
def test_what_is_no_utf8_is_replaced(content: bytes) -> None:
    shown = ByteText()
    assert "".join(map(shown.add, content)) + shown.rest() == content.decode(errors="replace")


def test_text_stops_after_its_end() -> None:
    shown = ByteText("é\n".encode())
    stopped = []
    for byte in "né e\né\n".encode():
        shown.add(byte)
        stopped.append(shown.stopped)
    assert stopped == [False] * (len(stopped) - 1) + [True]


@given(seq_len=st.integers(1, 5000), trained=st.none() | st.integers(1, 6000), per_octave=st.sampled_from([0.5, 4]))
def test_ranges_cover_all_context_and_part_at_the_training_length(
    seq_len: int, trained: int, per_octave: float
) -> None:
    edges = edges_of(seq_len, trained, per_octave).tolist()
    assert (edges[0], edges[-1]) == (1, seq_len + 1) and edges == sorted(set(edges))
    assert trained is None or trained >= seq_len or trained + 1 in edges
    assert set(edges_of(seq_len, trained, 0.5).tolist()) <= set(edges_of(seq_len, trained, 4).tolist())


def test_means_are_of_predictions_and_errors_of_sequences(tmp_path: Path) -> None:
    losses = torch.rand(6, 40, dtype=torch.float64)
    edges = edges_of(40, 24)
    sums = torch.stack([losses[:, a - 1 : b - 1].sum(1) for a, b in pairwise(edges.tolist())], 1)
    measured, bits = ByContext(edges, sums), losses / log(2)
    for mean in [*measured.fine(), *measured.coarse(24), measured.whole]:
        part = bits[:, mean.first - 1 : mean.last].mean(1)
        assert mean.bits == pytest.approx(float(part.mean())) and mean.error == pytest.approx(
            float(part.std() / 6**0.5)
        )
    assert [(mean.first, mean.last) for mean in measured.coarse(24)] == [(1, 4), (5, 16), (17, 24), (25, 40)]
    assert list(table(measured.coarse(24)))[2].startswith("  after 17 to 24 bytes: ")
    assert replace(measured, sums=sums[:1]).whole.error is None
    for name, trained in (("a.png", 24), ("b.png", None)):
        plot(measured, trained, "title", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
