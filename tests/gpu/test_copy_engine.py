"""The ring by copy engines, over GPUs with peer access, against NCCL and dense float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import distflash as df
from distflash.schedules import Schedule
from tests import dense
from tests.dense import Problem, Results
from tests.gpu import problems
from tests.gpu.test_ring import LAYOUTS, alone, assert_no_less_exact, device, ring_part
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs GPUs that reach one another's memory"),
]


def part(p: Problem, layout: df.Layout, schedule: Schedule, room: int, turns: int) -> Results:
    """Runs as a rank: its part of a problem, the last of some turns."""
    engine = df.transport.CopyEngine(dist.group.WORLD, room=room)
    cp = df.ContextParallel(engine, layout=layout, schedule=schedule)
    for _ in range(turns):
        results = problems.to_cpu(dense.on_rank(p, problems.on(dense.make_inputs(p), device()), cp))
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("name", problems.PROBLEMS)
@pytest.mark.parametrize("room", [4096, 2**24])
def test_what_arrives_is_what_nccl_brings(name: str, layout: df.Layout, room: int, ranks: Ranks) -> None:
    p = dense.in_dtype(problems.PROBLEMS[name], torch.bfloat16)
    parts = ranks.run(part, p, layout, df.Ring(), room, 2)
    by_nccl = ranks.run(ring_part, p, layout)
    for copied, sent in zip(parts, by_nccl, strict=True):
        assert torch.equal(copied["out"], sent["out"]) and torch.equal(copied["lse"], sent["lse"])
    assert_no_less_exact(p, dense.join(parts, layout, p.seq_len), ranks.run(alone, p)[0])


@pytest.mark.parametrize("schedule", [df.AllGather(), df.Ulysses(), df.PassQuery()], ids=repr)
def test_other_schedules(schedule: Schedule, ranks: Ranks) -> None:
    p = dense.in_dtype(problems.PROBLEMS["everything"], torch.bfloat16)
    parts = ranks.run(part, p, df.Zigzag(), schedule, 2**20, 1)
    assert_no_less_exact(p, dense.join(parts, df.Zigzag(), p.seq_len), ranks.run(alone, p)[0])
