"""Each benchmark from its command line to its record and picture, tiny, on the CPU."""

import json
import sys

import pytest
import torch

from benchmarks import common, gpt2, kernels, masks, profile_ring, reproducible, ring, ring_steps
from benchmarks.common import Shape
from benchmarks.peers import local

pytest.importorskip("matplotlib")

SIZES = "--heads 2 --kv-heads 1 --head-dim 16 --dtype float32"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a benchmark's main with arguments; its record."""

    def run(module, arguments, name):
        words = [*arguments.split(), "--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [module.__file__, *words])
        assert module.main() == 0
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_gpt2(run):
    record = run(gpt2, "--batch 1 --seq-len 48 --heads 2 --head-dim 16", "gpt2")
    assert {gpt2.OURS, gpt2.PLAIN} <= set(record["errors"]) and local.CUDNN in record["left_out"]
    assert record["environment"]["command"].startswith("python -m benchmarks.gpt2 --batch 1")


def test_masks(run):
    record = run(masks, f"--seq-len 64 --peers {SIZES}", "masks-1")
    assert set(record["share"]) == {
        f"distflash, {mask}, 1 rank|{which}" for mask in masks.SPARSE for which in ("forward", "backward")
    }
    assert record["left_out"].keys() == {f"{local.FLASH4}, {mask}, 1 rank" for mask in (masks.DENSE, *masks.SPARSE)}


def test_some_masks_beside_flex_attention(run, monkeypatch):
    """FlexAttention has no backward on CPUs of torch 2.13: it is entered for every mask, by one candidate."""
    made, flex = [], local.MAKERS[local.FLEX]
    monkeypatch.setitem(local.MAKERS, local.FLEX, lambda: (made.append(1), flex())[1])
    record = run(masks, f"--seq-len 64 --masks blocks window4096 --flex --name some {SIZES}", "some")
    timed = {key.split("|")[0] for key in record["tflops"]}
    names = {f"distflash, {mask}, 1 rank" for mask in (masks.DENSE, "blocks", "window4096")}
    assert names <= timed and len(made) == 1
    assert timed | record["left_out"].keys() == names | {name.replace("distflash", local.FLEX) for name in names}


def test_reproducible(tmp_path, monkeypatch):
    sizes = "--seq-len 64 --heads 2 --kv-heads 1 --head-dim 16 --ranks 1 2 --chunks 16"
    monkeypatch.setattr(sys, "argv", [reproducible.__file__, *sizes.split(), "--out", str(tmp_path)])
    assert reproducible.main() == 0
    rows = json.loads((tmp_path / "reproducible-cpu.json").read_text())["rows"]
    assert {name: row["calls"] for name, row in rows.items()} == {
        "ring | 1": 1, "ring | 2": 2, "reproducible, chunk 16 | 1": 4, "reproducible, chunk 16 | 2": 2
    }  # fmt: skip
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in rows.values())


def test_ring_of_one(run):
    record = run(ring, f"--seq-lens 64 {SIZES}", "ring-causal-1")
    row = record["rows"][0]
    assert set(row["tflops"]) == {f"{who}|{which}" for who in ("ring", "single") for which in ("forward", "backward")}
    assert row["exchanges"] == 0 and row["balance"] == 1


def test_other_schedules_beside_the_ring(run):
    record = run(ring, f"--seq-lens 64 --schedules ulysses pass-query {SIZES}", "ring-causal-1")
    names = {key.split("|")[0] for key in record["rows"][0]["tflops"]}
    assert names == {"ring", "single", "ulysses", "pass-query"}


def test_ring_steps(run):
    """Of the first rank's 800 tokens the first 400 see no key of the other rank: a group of 384 is left out."""
    record = run(ring_steps, f"--seq-len 1600 --ranks 2 --compare {SIZES}", "ring-steps-window4096-zigzag-2")
    cases = record["cases"]
    assert list(cases) == [f"rank {rank}{rows}" for rank in range(2) for rows in ("", ", all rows")]
    assert cases["rank 0"]["rows"] == [800, 416] and cases["rank 0, all rows"]["rows"] == [800, 800]
    assert all(case[which]["share"] > 0 for case in cases.values() for which in ("forward", "backward"))


def test_profile_ring(run):
    record = run(profile_ring, f"--seq-len 64 {SIZES}", "profile-causal-1")
    sums = record["summary"][0]
    assert sums["attention forward"] > 0 and sums["attention backward"] > 0
    assert sums["all"] >= sums["attention forward"] + sums["attention backward"]


def test_a_wrong_result_of_ours_fails_the_profile(run, monkeypatch):
    monkeypatch.setattr(profile_ring, "wrong", lambda errors, dtype: True)
    with pytest.raises(AssertionError):
        run(profile_ring, f"--seq-len 64 {SIZES}", "profile-causal-1")


def test_a_row_of_kernels():
    clock = common.Clock(torch.device("cpu"), 0.001)
    bench = kernels.Bench((local.FLASH, local.FLASH4), torch.float32, clock, with_portable=True)
    row = bench.row(Shape(1, 64, 2, 2, 16, 16), "causal")
    assert set(row["ratios"]) == {f"{n}|{w}" for n in (kernels.BARE, local.FLASH) for w in ("forward", "backward")}
    assert set(row["left_out"]) == {kernels.PORTABLE, local.FLASH4}
    assert "Triton" in row["left_out"][kernels.PORTABLE] and "flash_attn" in row["left_out"][local.FLASH4]
