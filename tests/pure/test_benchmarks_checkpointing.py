"""`benchmarks/checkpointing.py` from its command line to its record, tiny, on the CPU."""

import json
import sys

import pytest
import torch

from benchmarks import checkpointing
from benchmarks.checkpointing import ALL, KEPT, NONE

pytest.importorskip("matplotlib")


def test_counts_and_bytes_are_those_predicted(tmp_path, monkeypatch):
    sizes = "--seq-lens 64 --layers 2 --heads 2 --kv-heads 1 --head-dim 16"
    words = f"--device cpu --seconds 0.001 {sizes} --out {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", [checkpointing.__file__, *words])
    assert checkpointing.main() == 0
    (row,) = json.loads((tmp_path / "checkpointing-1.json").read_text())["rows"]
    assert row["attention forwards"] == {NONE: 1, ALL: 2, KEPT: 1}
    assert set(row["gradients differ"].values()) == {0.0}
    # out [1, 64, 2, 16] and lse [1, 2, 64], float32, of two layers.
    extra = row["bytes of out and lse"]
    assert extra["predicted"] == 2 * 64 * 2 * (16 + 1) * 4
    assert extra["seen"] == pytest.approx(extra["predicted"], rel=0.01)
    assert row["kept bytes"][ALL] < row["kept bytes"][KEPT] < row["kept bytes"][NONE]
    assert (tmp_path / "checkpointing-1.png").stat().st_size > 5000


def test_what_cannot_be_right_is_said():
    row = {
        "attention forwards": {NONE: 1, ALL: 2, KEPT: 2},
        "gradients differ": {NONE: 0.0, ALL: 0.0, KEPT: float("nan")},
        "bytes of out and lse": {"predicted": 100, "seen": 200},
    }
    assert len(checkpointing.problems(row, torch.float32)) == 3
