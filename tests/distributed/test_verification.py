"""`df.verify`: right steps pass; errors in others are found and located, on every rank."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distflash as df
from distflash.recipes.config import ModelConfig
from distflash.recipes.model import Decoder
from tests import forked
from tests.jobs import ROOT

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


class Poisoned(nn.Module):
    """A layer one of whose tokens, or all of a rank's, is NaN."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).index_fill(1, torch.tensor([5]), torch.nan)


class WrongBackward(nn.Module):
    """A layer whose weight has a gradient that is a thousandth too large on one rank."""

    def __init__(self, layer, cp):
        super().__init__()
        self.weight, self.cp = layer.weight, cp

    def forward(self, x):
        weight = self.weight
        if self.cp.world_size > 1 and self.cp.rank == 0:
            weight = 1.001 * weight - 0.001 * weight.detach()
        return F.linear(x, weight)


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
    if case.fault == "gradient":
        model.blocks[2].ffn.up = WrongBackward(model.blocks[2].ffn.up, cp)
    if case.fault == "nan":
        attention.v_proj = Poisoned(attention.v_proj)
    if case.fault == "mask":
        drop_the_mask(attention, cp)
    if case.wrapper == "ddp":
        return DistributedDataParallel(model)
    if case.wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    return model


def step_of(case, model):
    """What users write: shards where it is given a group, and is plain torch otherwise."""
    mask = mask_of(case)

    def step(batch, cp):
        tokens, labels = batch
        if cp is not None:
            tokens = cp.shard(tokens)
            labels = shifted_after_sharding(batch[0], cp) if case.fault == "labels" else cp.shard(labels)
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
    attention.forward = lambda x, mask, seq_len, cache=None: plain(
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


@pytest.mark.parametrize(("name", "world_size"), [("plain", 1), *((name, W) for name in RIGHT for W in (2, 3))])
def test_a_right_step_passes(name, world_size, ranks_of):
    report = one_report(ranks_of(world_size), RIGHT[name])
    assert report.ok, str(report)
    assert {row.kind for row in report.rows} >= {"loss", "output", "gradient"}
    assert any(row.name == "blocks.0.attention.q_proj.weight" for row in report.rows)
    report.require()


# What is wrong, and where the report says that it begins.
WRONG = {
    "factor": None,
    "rope": "blocks.1.attention.rope",
    "labels": "the loss: no layer's output differs",
    "mask": "blocks.1.attention, in what it does before it calls blocks.1.attention.o_proj",
    "gradient": "backward of blocks.2.ffn.up",
    "nan": "blocks.1.attention.v_proj",
}


@pytest.mark.parametrize(
    ("fault", "wrapper"), [*((fault, "") for fault in WRONG), ("factor", "ddp"), ("factor", "fsdp"), ("rope", "fsdp")]
)
def test_what_is_wrong_is_named(fault, wrapper, ranks_of):
    report = one_report(ranks_of(2), Case(fault=fault, wrapper=wrapper, documents=fault == "nan"))
    first = report.first
    assert not report.ok and (first == WRONG[fault] if WRONG[fault] is None else first.startswith(WRONG[fault]))
    assert (report.not_finite is not None) == (fault == "nan")
    if fault == "nan":
        assert report.not_finite.startswith("blocks.1.attention.v_proj (64 elements, from token 5 on)")
    if fault == "factor":
        factor = "0.5" if wrapper else "2"
        assert f"all gradients are {factor} times what they should be" in str(report)
    wrong = {row.name for row in report.rows if row.kind == "gradient" and not row.ok}
    assert fault != "gradient" or wrong == {"blocks.2.ffn.up.weight"}
    with pytest.raises(ValueError, match="NOT VERIFIED"):
        report.require()


def refused(change):
    """Runs as a rank: a step that does not keep its contract, and the words of the error."""
    cp = df.ContextParallel(dist.group.WORLD)
    case = Case()
    model = model_of(case, cp)
    right = step_of(case, model)

    def step(batch, given):
        if change == "own group":
            x = batch[0][:, :66, None, None].float().expand(-1, -1, 2, 8)
            x = x if given is None else given.shard(x)
            return df.attention(x, x, x, cp=cp).square().mean()  # "cp" where it should be "given"
        if change == "no loss":
            return right(batch, given)[None, None].expand(1, 2, 2)
        if change == "rank" and cp.rank == 1 and given is not None:
            raise KeyError("no tokens today")
        loss = right(batch, given)
        if change == "weights":
            torch.optim.SGD(model.parameters(), lr=0.1).step(loss.backward)
        return loss

    with pytest.raises((ValueError, KeyError, RuntimeError)) as error:
        df.verify(step, batch_of(case), cp, reduction="sum", quiet=True)
    return f"{type(error.value).__name__}: {error.value}"


REFUSED = {
    "own group": "ValueError: step: the replay, step(batch, None), attended over the group",
    "weights": "ValueError: step: changed the weights",
    "no loss": r"ValueError: step: expected it to return the loss, a scalar, first; got a tensor of shape (1, 2, 2)",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_step_that_breaks_its_contract_is_refused_on_every_rank(change, ranks_of):
    told = "ValueError: distflash.verify: rank 0 raised ", "ValueError: distflash.verify: rank 1 raised "
    for words in ranks_of(2).run(refused, change):
        assert words.startswith((REFUSED[change], *(by + REFUSED[change] for by in told)))  # who is late is told


def test_a_rank_that_raises_stops_the_others_with_its_words(ranks_of):
    others, raised, more = ranks_of(3).run(refused, "rank")
    assert raised == "KeyError: 'no tokens today'"
    for words in (others, more):
        assert words.startswith("RuntimeError: distflash.verify: rank 1 raised KeyError: 'no tokens today'")


def attends(fault):
    """Runs as a rank: no module at all; the inputs require gradients, and step returns the output beside the loss."""
    cp = df.ContextParallel(dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randn(1, SEQ_LEN, 2, 8, generator=generator).requires_grad_() for _ in range(3)]

    def step(batch, given):
        q, k, v = (x if given is None else given.shard(x) for x in batch)
        if fault == "detach" and given is not None:
            k = k.detach()
        out = df.attention(q, k, v, mask=df.Causal(), cp=given, seq_len=SEQ_LEN)
        total = out.square().sum()
        loss = total / batch[0].numel() if given is None else given.mean(total, out.numel(), reduction="sum")
        return loss, out

    report = df.verify(step, batch, cp, quiet=True)
    assert all(x.grad is None for x in batch)
    return report


def test_inputs_and_outputs_without_a_module(ranks_of):
    right, wrong = (ranks_of(2).run(attends, fault)[0] for fault in ("", "detach"))
    assert right.ok, str(right)
    assert [f"{row.kind} {row.name}" for row in right.rows if row.kind != "ranks"] == [
        "loss ",
        "output returned[0]",
        *(f"gradient batch[{n}]" for n in range(3)),
    ]
    assert [row.name for row in wrong.rows if not row.ok] == ["batch[1]"]


def data_parallel(fault):
    """Runs as a rank of data 2 x context 2 under DDP: each row of the mesh takes one row of the batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    cp, case = df.ContextParallel(mesh["context"]), Case()
    model = DistributedDataParallel(model_of(case, cp))

    def step(batch, given):
        if given is None:
            tokens, labels = batch
        else:
            row = mesh.get_local_rank("data")
            tokens, labels = (given.shard(x[row : row + 1]) for x in batch)
        total = F.cross_entropy(model(tokens, SEQ_LEN).flatten(0, 1), labels.flatten(), reduction="sum")
        group = None if fault else dist.group.WORLD
        return (
            total / labels.numel()
            if given is None
            else given.mean(total, labels.numel(), reduction="mean", group=group)
        )

    return df.verify(step, batch_of(case), cp, group=dist.group.WORLD, quiet=True)


def test_data_parallel_ranks(ranks_of):
    for fault in ("", "counts the tokens of one ring"):
        reports = ranks_of(4).run(data_parallel, fault)
        assert all(report == reports[0] for report in reports)
        assert reports[0].ok == (not fault), str(reports[0])
        assert any("no module's output was compared" in note for note in reports[0].notes)


def elsewhere(fault):
    """Runs as a rank: another model makes the replay, and step itself brings the gradients, as under DeepSpeed."""
    cp, case = df.ContextParallel(dist.group.WORLD), Case()
    model, twin = model_of(case, cp), model_of(case, None)

    def step(batch, given):
        loss = step_of(case, twin if given is None else model)(batch, given)
        used = twin if given is None else model
        gradients = torch.autograd.grad(loss, list(used.parameters()))
        named = {name: g for (name, _), g in zip(used.named_parameters(), gradients, strict=True)}
        if given is not None:
            for g in named.values():
                dist.all_reduce(g)
            named["norm.weight"] *= 1.01 if fault else 1.0
        return loss, named

    return df.verify(step, batch_of(case), cp, quiet=True)


def test_gradients_that_step_brings(ranks_of):
    right, wrong = (ranks_of(2).run(elsewhere, fault)[0] for fault in ("", "one percent"))
    assert right.ok and not right.notes, str(right)
    assert [row.name for row in wrong.rows if not row.ok] == ["norm.weight"]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_example_of_the_documentation(reduction, tmp_path):
    """As it stands it is verified; with the other reduction it ends as the text says."""
    example = (ROOT / "docs/verify.md").read_text().split("```python\n")[1].split("```")[0]
    file = tmp_path / "example.py"
    file.write_text(example.replace('reduction="mean"', f'reduction="{reduction}"'))
    text = forked.finish(2, file, expected=int(reduction == "sum"), timeout=300)
    assert ("verified: sharded and unsharded agree in" in text) == (reduction == "mean")
    assert ("all gradients are 0.5 times what they should be" in text) == (reduction == "sum")


class AsksForPositions(nn.Module):
    """As the README's model: what it asks of its group it can also ask of a group of one."""

    def __init__(self, cp):
        super().__init__()
        self.cp, self.qkv = cp, nn.Linear(8, 24, dtype=torch.float64)
        self.rope = df.nn.RotaryEmbedding(8)

    def forward(self, x, seq_len):
        q, k, v = self.qkv(x)[:, :, None].chunk(3, dim=-1)
        q, k = self.rope(q, k, self.cp.positions(seq_len))
        return df.attention(q, k, v, mask=df.Causal(), cp=self.cp, seq_len=seq_len)


def verified_positions():
    cp = df.ContextParallel(dist.group.WORLD)
    torch.manual_seed(0)
    model, x = DistributedDataParallel(AsksForPositions(cp)), torch.randn(1, SEQ_LEN, 8, dtype=torch.float64)

    def step(batch, cp):
        out = model(batch if cp is None else cp.shard(batch), SEQ_LEN)
        total = out.square().sum()
        return total / batch.numel() if cp is None else cp.mean(total, out.numel(), reduction="mean")

    return df.verify(step, x, cp, quiet=True).ok, model.module.cp is cp


def test_a_model_may_ask_its_group_for_positions_in_the_replay(ranks_of):
    assert ranks_of(2).run(verified_positions) == [(True, True)] * 2
