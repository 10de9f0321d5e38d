"""FSDP2 over data x context: 20 steps of 4 ranks are those of one process, in losses, norms and weights.

How far may they be apart? Four times as far as rounding takes one process from itself, of which there are two samples:
the same run in float64, and from weights that are one unit in the last place off.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distflash as df
from distflash.recipes.config import ModelConfig
from distflash.recipes.fsdp import whole
from distflash.recipes.model import VOCABULARY, Decoder
from tests.training import nudge

SHAPE = ModelConfig(layers=2, dim=16, heads=2, kv_heads=1, ffn=32)
SEQ_LEN = 43  # that nothing divides
ROWS, STEPS = 2, 20
CLIP = 0.6
SIGMAS = 4
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}
# The first row has the more documents, and the fewer labels: what each rank contributes differs.
DOCUMENTS = [(0, 5, 6, 31, SEQ_LEN), (0, 20, SEQ_LEN)]


@dataclass(frozen=True)
class Run:
    """Of every step the loss and the gradient's norm before clipping, and the weights at the end, flat."""

    losses: torch.Tensor
    norms: torch.Tensor
    weights: torch.Tensor


def mask_of(step, row):
    """Every other step keeps documents apart."""
    return df.Causal() & df.Documents(DOCUMENTS[row]) if step % 2 else df.Causal()


def batch_of(step, row):
    """Tokens and labels [1, S]; the labels of the documents' last tokens are ignored."""
    generator = torch.Generator().manual_seed(1000 * step + row)
    # Bytes that are far from equally frequent: there is something to learn.
    tokens = torch.randint(0, VOCABULARY, (1, SEQ_LEN + 1), generator=generator) ** 2 // VOCABULARY
    labels = tokens[:, 1:].clone()
    labels[:, [end - 1 for end in DOCUMENTS[row][1:]]] = -100
    return tokens[:, :-1], labels


def sum_and_count(model, tokens, labels, mask):
    logits = model(tokens, SEQ_LEN, mask)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total, (labels >= 0).sum()


def train(model, optimizer, loss_of_step, steps):
    """The run, and nothing in it that knows of ranks."""
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of_step(step)
        loss.backward()
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.detach())
    weights = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    return Run(torch.stack(losses), torch.stack(norms), weights)


@cache
def alone(optimizer, dtype=torch.float32, nudged=False, steps=STEPS):
    """All rows in one process, in one plain loss."""
    torch.manual_seed(0)
    model = Decoder(SHAPE).to(dtype)
    if nudged:
        nudge(model, seed=0)

    def loss_of_step(step):
        parts = [sum_and_count(model, *batch_of(step, row), mask_of(step, row)) for row in range(ROWS)]
        sums, counts = zip(*parts, strict=True)
        return sum(sums) / sum(counts)

    return train(model, OPTIMIZERS[optimizer](model.parameters()), loss_of_step, steps)


def sharded(optimizer, layout, reduction="mean", steps=STEPS, hybrid=False):
    """Runs as one of 4 ranks: two of them to a row. Hybrid: rows are replicas of a model sharded over the two."""
    mesh = init_device_mesh("cpu", (ROWS, 2), mesh_dim_names=("data", "context"))
    cp, everyone = df.ContextParallel(mesh["context"], layout), mesh["data", "context"]._flatten("everyone")
    torch.manual_seed(0)
    model = Decoder(SHAPE, cp)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh if hybrid else everyone)
    row, positions = mesh.get_local_rank("data"), cp.positions(SEQ_LEN)

    def loss_of_step(step):
        tokens, labels = (x[:, positions] for x in batch_of(step, row))
        return cp.mean(*sum_and_count(model, tokens, labels, mask_of(step, row)), reduction=reduction, group=everyone)

    return train(model, OPTIMIZERS[optimizer](model.parameters()), loss_of_step, steps)


def distances(run, other):
    return {name: (getattr(run, name) - getattr(other, name)).norm() for name in ("losses", "norms", "weights")}


@pytest.mark.parametrize("layout", [df.Zigzag(), df.Contiguous()], ids=repr)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_are_those_of_one_process(optimizer, layout, ranks_of):
    plain = alone(optimizer)
    # A run in which gradients of a wrong scale would show: it learns, and is clipped at some steps but not at all.
    assert (plain.norms > CLIP).any() and (plain.norms < CLIP).any() and plain.losses[-1] < plain.losses[0]
    runs = ranks_of(4).run(sharded, optimizer, layout)
    samples = [distances(other, plain) for other in (alone(optimizer, torch.float64), alone(optimizer, nudged=True))]
    rounding = {name: max(sample[name] for sample in samples) for name in samples[0]}
    for run in runs:
        seen = distances(run, plain)
        assert all(seen[name] <= SIGMAS * rounding[name] for name in seen), f"{seen}, of rounding {rounding}"
        assert torch.equal(run.weights, runs[0].weights)


def test_hybrid_sharding_averages_over_the_same_ranks(ranks_of):
    plain = alone("sgd", steps=1)
    for run in ranks_of(4).run(sharded, "sgd", df.Zigzag(), "mean", 1, True):
        torch.testing.assert_close((run.losses, run.norms, run.weights), (plain.losses, plain.norms, plain.weights))


def test_a_wrong_reduction_shows(ranks_of):
    """What FSDP averages over four ranks must not be brought for a sum: gradients would be a quarter."""
    plain = alone("sgd", steps=1)
    for run in ranks_of(4).run(sharded, "sgd", df.Zigzag(), "sum", 1):
        torch.testing.assert_close(run.losses, plain.losses)
        torch.testing.assert_close(run.norms, plain.norms / 4)


def refusals():
    """Runs as one of 4 ranks: what is said about meshes and groups that are not right."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    cp, loss = df.ContextParallel(mesh["context"]), torch.zeros(())
    attempts = {
        "part of the world": lambda: df.ContextParallel(init_device_mesh("cpu", (3,))).world_size,
        "data alone": lambda: cp.mean(loss, 1, reduction="mean", group=mesh["data"]),
        "two dimensions": lambda: cp.mean(loss, 1, reduction="mean", group=mesh),
        "an operation": lambda: cp.mean(loss, 1, reduction=dist.ReduceOp.AVG, group=dist.group.WORLD),
    }
    return {name: told(attempt) for name, attempt in attempts.items()}


def told(attempt):
    try:
        return attempt()
    except ValueError as error:
        return str(error)


def test_refusals_say_what_to_do(ranks_of):
    texts = ranks_of(4).run(refusals)
    outside = texts[3].pop("part of the world")
    assert "group: rank 3 is not in the mesh, which holds ranks [0, 1, 2] of 4; make a mesh of all ranks" in outside
    assert [text.pop("part of the world") for text in texts[:3]] == [3, 3, 3]
    for rank, text in enumerate(texts):
        data, context = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        assert f"group: holds ranks {data}, but ranks {context} share a sequence" in text["data alone"]
        assert 'flatten it: mesh["data", "context"]._flatten()' in text["two dimensions"]
        assert "reduction='mean' where they are averaged (DDP, FSDP2" in text["an operation"]
