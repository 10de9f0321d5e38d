"""`df.verify`: right steps pass, and what is wrong in others is found and named, on every rank alike."""

from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distflash as df
from launch.config import ModelConfig
from launch.model import Decoder

SHAPE = ModelConfig(layers=3, dim=32, heads=4, kv_heads=2, ffn=48)
SEQ_LEN = 67  # that nothing divides


@dataclass(frozen=True)
class Case:
    """What the ranks run. ``fault`` names what is wrong in the sharded step; see `wrong`."""

    fault: str = ""
    wrapper: str = ""
    dtype: torch.dtype = torch.float32
    layout: df.Layout = field(default_factory=df.Zigzag)
    documents: bool = False
    calls_backward: bool = False
    reduction: str | None = "sum"
    rows: int = 2


def batch_of(case):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 256, (case.rows, SEQ_LEN + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def mask_of(case):
    return df.Causal() & df.Documents([0, 20, 21, 50, SEQ_LEN]) if case.documents else df.Causal()


class Broken(nn.Module):
    """A layer that computes something else where it is sharded."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, *args, **kwargs):
        return self.change(self.layer, *args, **kwargs)


class LocalRope(nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, q, k, positions):
        return self.rope(q, k, torch.arange(q.shape[1]))


def model_of(case, cp):
    torch.manual_seed(0)
    model = Decoder(SHAPE, cp).to(case.dtype)
    attention = model.blocks[1].attention
    if case.fault == "rope":
        attention.rope = LocalRope(attention.rope)
    if case.fault == "gradient" and cp.rank == 0:
        model.blocks[2].ffn.up.weight.register_hook(lambda g: 1.001 * g)
    if case.fault == "nan":
        attention.v_proj.register_forward_hook(lambda m, args, out: poison(out))
    if case.wrapper == "ddp":
        return DistributedDataParallel(model)
    if case.wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    return model


def poison(out):
    return out.index_fill(1, torch.tensor([5]), torch.nan)


def step_of(case, model):
    """What users write: shards where it is given a group, and is plain torch otherwise."""
    mask = mask_of(case)

    def step(batch, cp):
        tokens, labels = batch
        if cp is not None:
            tokens = cp.shard(tokens)
            labels = shifted_after_sharding(batch[0], cp) if case.fault == "labels" else cp.shard(labels)
            if case.fault == "mask":
                drop_the_mask(model.blocks[1].attention, cp)
        logits = model(tokens, SEQ_LEN, mask)
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
        if cp is None:
            loss = total / (labels >= 0).sum()
        else:
            averaged = (case.wrapper != "" or case.reduction == "mean") != (case.fault == "factor")
            loss = cp.mean(total, (labels >= 0).sum(), reduction="mean" if averaged else "sum")
        if case.calls_backward:
            loss.backward()
        return loss

    return step


def shifted_after_sharding(tokens, cp):
    mine = cp.shard(tokens)
    return torch.cat([mine[:, 1:], mine.new_full((mine.shape[0], 1), -100)], 1)


def drop_the_mask(attention, cp):
    plain = type(attention).forward
    attention.forward = lambda x, mask, seq_len: plain(
        attention, x, mask=df.Full() if attention.cp is cp else mask, seq_len=seq_len
    )


def verified(case):
    cp = df.ContextParallel(dist.group.WORLD, case.layout)
    model = model_of(case, cp)
    before = [p.detach().clone() for p in model.parameters()]
    report = df.verify(
        step_of(case, model), batch_of(case), cp, reduction=None if case.wrapper else case.reduction, quiet=True
    )
    assert all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(module.cp is cp for module in model.modules() if isinstance(module, df.nn.SelfAttention))
    return report


def one_report(ranks, case):
    reports = ranks.run(verified, case)
    assert all(str(report) == str(reports[0]) for report in reports)
    return reports[0]


RIGHT = {
    "plain": Case(),
    "mean": Case(reduction="mean"),
    "nothing said": Case(reduction=None),
    "ddp": Case(wrapper="ddp"),
    "fsdp": Case(wrapper="fsdp", calls_backward=True),
    "bf16": Case(dtype=torch.bfloat16, rows=1),
    "float64": Case(dtype=torch.float64, layout=df.Striped(), documents=True),
    "documents": Case(layout=df.Contiguous(), documents=True, calls_backward=True),
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_step_passes(name, world_size, ranks_of):
    report = one_report(ranks_of(world_size), RIGHT[name])
    assert report.ok, str(report)
    print(name, world_size, report)
    assert {row.kind for row in report.rows} >= {"loss", "output", "gradient"}
    assert any(row.name == "blocks.0.attention.q_proj.weight" for row in report.rows)
    report.require()
