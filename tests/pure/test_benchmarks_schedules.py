"""Bytes and memory of schedules, counted by the package's own calls, against those of plans."""

import pytest
import torch

import distflash as df
from benchmarks import schedules
from benchmarks.schedules import Case

SIZES = dict(heads=4, kv_heads=2, dim=16)


@pytest.mark.parametrize("schedule", [df.Ring(), df.AllGather(2), df.PassQuery()], ids=repr)
@pytest.mark.parametrize("q_len", [None, 64], ids=["all queries", "the last 64"])
def test_what_a_rank_receives_is_what_its_plan_says(schedule, q_len):
    case = Case("", df.Causal(), df.Zigzag(), 256, q_len, **SIZES)
    for rank in range(case.world_size):
        forward, backward = schedules.count(case, schedule, rank)
        cp = df.ContextParallel(schedules.Counting(rank, case.shape), case.layout, schedule)
        plan = cp.plan(case.mask, 256) if q_len is None else cp.plan(case.mask, 256, q_start=192, q_len=64)
        sizes = (4, 2, 16, 16, torch.bfloat16)
        assert sum(forward.received.values()) == plan.bytes(*sizes) > 0
        assert sum(backward.received.values()) == plan.bytes(*sizes, backward=True) > 0
        assert forward.memory > 0 and backward.memory > 0


def test_the_tables_are_printed(monkeypatch, capsys):
    cases = (Case("a case", df.Causal() & df.Window(30), df.Contiguous(), 256, **SIZES),)
    monkeypatch.setattr(schedules, "CASES", cases)
    schedules.volumes()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == len(schedules.SCHEDULES)
