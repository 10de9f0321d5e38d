"""Parts of uptraining without ranks: options, held-out text, curves, and pooling."""

import json
from math import inf
from pathlib import Path

import pytest
import torch
from torch import nn

from distflash.recipes.config import ModelConfig
from distflash.recipes.data import open_corpus, open_held_out, standard_library
from distflash.recipes.grouping import keys_and_values, source_of
from distflash.recipes.held_out import plot_curves, read_curve
from distflash.recipes.model import Decoder
from distflash.recipes.options import parse
from distflash.recipes.uptrain_config import UptrainConfig
from distflash.recipes.uptraining import Source, configured

SHAPE = ModelConfig(layers=2, dim=32, heads=8, kv_heads=8)


def config(**options) -> UptrainConfig:
    return UptrainConfig(**{"source": Path("runs/train"), "kv_heads": 2, "device": "cpu", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0.0}, "--share: got 0.0, expected a positive, finite number"),
        ({"share": inf}, "--share: got inf"),
        ({"held_out_batches": 0}, "--held-out-batches: got 0"),
        ({"held_out_points": 0}, "--held-out-points: got 0"),
        ({"compare": True, "data": Path("text")}, "--compare: got --data without --held-out beside it"),
    ],
)
def test_options_that_are_none_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_the_command_line_asks_for_what_the_source_does_not_say() -> None:
    asked = parse(UptrainConfig, ["--source", "a", "--kv-heads", "2", "--share", "0.05", "--recompute-attention"])
    assert (asked.source, asked.kv_heads, asked.share, asked.recompute_attention) == (Path("a"), 2, 0.05, True)
    for option in ("--layers", "--heads", "--steps"):
        with pytest.raises(SystemExit):
            parse(UptrainConfig, ["--source", "a", "--kv-heads", "2", option, "2"])


def test_the_model_and_the_steps_follow_from_the_source() -> None:
    source = Source(Path("runs/train/checkpoints/step-00000250"), 250, SHAPE)
    found = configured(config(share=0.1, checkpoint_activations=True), source)
    assert found.steps == 25
    assert found.model == ModelConfig(layers=2, dim=32, heads=8, kv_heads=2, checkpoint_activations=True)
    assert configured(config(share=1e-9), source).steps == 1


@pytest.mark.parametrize("kv_heads", [0, 3, 8, 16])
def test_key_heads_that_do_not_fit_the_source_are_refused(kv_heads: int) -> None:
    source = Source(Path("runs/train/checkpoints/step-00000250"), 250, SHAPE)
    with pytest.raises(ValueError, match=f"--kv-heads: got {kv_heads}, expected a divisor of the source's 8 query"):
        configured(config(kv_heads=kv_heads), source)


def test_the_newest_checkpoint_of_a_run_is_taken_or_the_one_that_is_named(tmp_path: Path) -> None:
    for step in (3, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "model.json").write_text("{}")
    assert source_of(tmp_path).name == "step-00000010"
    assert source_of(tmp_path / "checkpoints" / "step-00000003").name == "step-00000003"
    with pytest.raises(ValueError, match=r"--source: got .*checkpoints, expected a run's --out, or a step-"):
        source_of(tmp_path / "checkpoints")


def test_held_out_text_is_what_the_default_of_data_leaves_out() -> None:
    trained, tests = set(standard_library()), set(standard_library(tests=True))
    assert trained and not trained & tests
    assert open_corpus(None, 64).files == tuple(sorted(trained))
    assert all({"test", "tests", "idle_test"} & set(file.parts) for file in tests)


def test_held_out_text_that_is_none_is_refused_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--held-out: .* holds no text file"):
        open_held_out(tmp_path, 4)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match=r"but --held-out has 4, separators included.* at most 3"):
        open_held_out(tmp_path, 4)
    assert open_held_out(tmp_path, 3).size == 4


def test_parameters_of_keys_and_values_are_named_by_their_modules_with_biases() -> None:
    """A module whose name ends as theirs do is another."""
    attention = Decoder(SHAPE).blocks[1].attention
    attention.v_proj = nn.Linear(32, 32, bias=True)
    attention.qkv_proj = nn.Linear(32, 96)
    found = keys_and_values("blocks.1.attention", attention)
    assert set(found) == {f"blocks.1.attention.{n}" for n in ("k_proj.weight", "v_proj.weight", "v_proj.bias")}
    assert found["blocks.1.attention.v_proj.bias"] is attention.v_proj.bias


def test_curves_are_read_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps({"0": 3.0, "5": 2.0}))
    assert read_curve(path) == {0: 3.0, 5: 2.0}
    plot_curves(tmp_path / "a.png", {"mean": {0: 3.0, 5: 2.0}, "first": {0: 4.0, 5: 2.5}}, 1.9, 50, "title")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    for text in ("[1]", '{"a": 1}', '{"0": null}', "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"held_out.json"):
            read_curve(path)


@torch.no_grad()
def test_a_decoder_whose_heads_are_equal_in_groups_is_the_grouped_one() -> None:
    """The layout of heads that is pooled is the one that the decoder has."""
    import distflash as df

    torch.manual_seed(0)
    small = Decoder(ModelConfig(layers=2, dim=32, heads=8, kv_heads=2)).double()
    large, tokens = Decoder(SHAPE).double(), torch.arange(12)[None]
    state = small.state_dict()
    expanded = {
        name: x.view(2, 4, -1).repeat_interleave(4, 0).flatten(0, 1) if "k_proj" in name or "v_proj" in name else x
        for name, x in state.items()
    }
    large.load_state_dict(expanded)
    torch.testing.assert_close(large(tokens, 12), small(tokens, 12), rtol=1e-12, atol=1e-12)
    for index, block in enumerate(large.blocks):
        for name, parameter in keys_and_values(f"blocks.{index}.attention", block.attention).items():
            assert torch.equal(df.nn.pool_heads(parameter, 8, 8, 2), state[name])
