"""The benchmark of dropout, tiny and on the CPU; and what it notices of others' dropout."""

import json
import sys

import pytest
import torch
from torch import Tensor

import distflash as df
from benchmarks import common, dropout, reference
from benchmarks.common import Shape
from benchmarks.comparison import Candidate, reference_for
from benchmarks.kernels import bare
from distflash.dropout import as_seed, dropout_of
from distflash.kernels import Reference

CPU = torch.device("cpu")


def by_torch(p: float = dropout.P, scaled: bool = True, remembered: bool = True) -> Candidate:
    """Attention with dropout by torch. Wrong if it is not scaled, or if backward drops other pairs."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        probability = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        thinned = torch.nn.functional.dropout(probability, p) * (1 if scaled else 1 - p)
        if remembered:
            return thinned @ v
        other = torch.nn.functional.dropout(probability, p) @ v
        return other + (thinned @ v - other).detach()

    return Candidate(attend, heads_first=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_others_is_looked_at(dtype):
    torch.manual_seed(0)
    errors = dropout.dropped(by_torch(), 64, dtype, CPU)
    assert not reference.wrong(errors, torch.bfloat16), errors


@pytest.mark.parametrize(
    ("name", "options"),
    [("share kept", {"p": 0.15}), ("kept", {"scaled": False}), ("dropped in backward", {"remembered": False})],
)
def test_wrong_dropout_of_others_is_found(name, options):
    torch.manual_seed(0)
    errors = dropout.dropped(by_torch(**options), 64, torch.float32, CPU)
    assert reference.wrong({name: errors[name]}, torch.bfloat16), errors


@pytest.mark.parametrize("mask", [df.Full(), df.Causal()], ids=repr)
def test_ours_is_held_against_float64_with_the_same_pairs_dropped(mask):
    shape, cp = Shape(2, 96, 4, 2, 16, 16), df.ContextParallel(df.transport.Alone())
    inputs = common.random_inputs(shape, shape.S, torch.float32, CPU)
    right = reference_for(inputs, mask, cp, shape.S, reference.Dropped(0.25, 7))
    for seed, fits in ((7, True), (8, False)):
        thinned = dropout_of(0.25, as_seed(seed, CPU))
        found = bare(inputs, mask, Reference(), thinned, with_preprocess=True)
        found.calls["backward"]()
        assert reference.wrong(right.errors(**found.results), torch.float32) is not fits


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [dropout.__file__, "--device", "cpu", "--seconds", "0.001", *words])
    return dropout.main()


def test_from_the_command_line_to_the_record(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    for table in ("TABLE", "ORDERED"):
        monkeypatch.setattr(dropout, table, getattr(dropout, table)[:2])
    assert run(monkeypatch, "--tiny", "--dtype", "float32", "--out", str(tmp_path)) == 0
    assert (tmp_path / "dropout.png").stat().st_size > 5000
    record = json.loads((tmp_path / "dropout.json").read_text())
    assert [row["mask"] for row in record["rows"]] == ["full", "causal"]
    for row in record["rows"]:
        assert {f"{name}|{which}" for name in (dropout.OURS, dropout.WITHOUT) for which in ("forward", "backward")} <= (
            row["tflops"].keys()
        )
        assert all(share > 0 for share in row["of own rate"].values()) and len(row["of own rate"]) == 2
    for row in record["deterministic"]:  # a CPU has no such kernel
        assert row["share"] is None and "GPU" in row["left_out"][dropout.IN_ORDER]
    assert record["p"] == 0.1 and record["environment"]["command"].startswith("python -m benchmarks.dropout")


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", str(tmp_path))
    assert "the kernels run on GPUs, and there is none here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_was_asked_for_is_in_the_tables():
    assert {(shape.D, mask) for shape, mask in dropout.TABLE} == {(D, m) for D in (64, 128) for m in ("full", "causal")}
    assert all((shape.S, shape.H, shape.G) == (16384, 16, 16) for shape, _ in dropout.TABLE)
    asked = {(s.D, s.S, s.H, s.G, mask) for s, mask in dropout.ORDERED}
    assert len(asked) == len(dropout.ORDERED) == 16
