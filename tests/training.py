"""Tiny training runs from the same weights and data: plain torch on one device, and DeepSpeed over ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distflash as df
from distflash.recipes.config import ModelConfig
from distflash.recipes.model import Decoder

IGNORED = -100
MAX_DOCUMENTS = 4
SHAPE = ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, ffn=32)

# Neither of the two has seen what the other rounds: what one nudged run differs by counts as a standard deviation.
SIGMAS = 4


@dataclass(frozen=True)
class Run:
    """The first three lines say what is trained, the others how it is spread over ranks.

    documents: whether each sequence is packed of up to `MAX_DOCUMENTS`. clip: largest norm of the gradient, 0 for any.
    """

    optimizer: str = "SGD"
    documents: bool = False
    clip: float = 0.0
    tied: bool = False
    steps: int = 6
    seq_len: int = 45
    micro_batches: int = 2
    data: int = 1

    context: int = 2
    pipe: int = 1
    stage: int = 0
    layout: df.Layout = field(default_factory=df.Zigzag)
    checkpoint: bool = False

    def __str__(self) -> str:
        ranks = f"pipe {self.pipe} x data {self.data} x context {self.context}"
        return f"ZeRO-{self.stage}, {ranks}, {self.layout}, {self.optimizer}, documents={self.documents}"


@dataclass(frozen=True)
class Packed:
    """tokens and labels int64 [1, S], labels shifted; cu_seqlens [documents + 1]."""

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Outcome:
    """losses of the steps; weights by the decoder's names, in a pipeline those of this rank's stage."""

    losses: list[float]
    weights: dict[str, Tensor]


def make_decoder(cp: df.ContextParallel | None, checkpoint: bool = False) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(SHAPE, checkpoint_activations=checkpoint), cp)


def make_optimizer(run: Run, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if run.optimizer == "SGD":
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.5)
    # Adam's update of a gradient that is rounding and nothing else would be as large as any other: hence the eps.
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, eps=1e-4)


def sequences(run: Run, step: int) -> list[Packed]:
    """The ``micro_batches * data`` sequences of a step; every tenth label or so does not count."""
    generator = torch.Generator().manual_seed(step)

    def sequence() -> Packed:
        whole = torch.randint(32, (1, run.seq_len + 1), generator=generator)
        labels = whole[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORED
        inner = (torch.randperm(run.seq_len - 1, generator=generator) + 1)[: 1 + step % (MAX_DOCUMENTS - 1)]
        return Packed(whole[:, :-1], labels, torch.tensor([0, *sorted(inner.tolist()), run.seq_len]))

    return [sequence() for _ in range(run.micro_batches * run.data)]


def micro_batches(run: Run, data_rank: int, first: int = 0) -> Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
    """What a data loader gives the ranks of one ring: whole sequences, from the step ``first`` on."""
    for step in range(first, run.steps):
        for s in sequences(run, step)[data_rank :: run.data]:
            yield (s.tokens, s.cu_seqlens) if run.documents else s.tokens, s.labels


def alone(run: Run, nudged: bool = False) -> tuple[Outcome, list[float]]:
    """The run on one device, and the norms of its gradients.

    nudged: with every weight moved by one rounding unit, up or down, before each step.
    """
    model = make_decoder(None)
    if run.tied:
        model.head.weight = model.embedding.weight
    optimizer, losses, norms = make_optimizer(run, list(model.parameters())), [], []
    for step in range(run.steps):
        if nudged:
            nudge(model, step)
        loss = loss_of(run, model, step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip if run.clip else torch.inf)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Outcome(losses, {name: p.detach() for name, p in model.named_parameters()}), norms


def loss_of(run: Run, model: Decoder, step: int) -> Tensor:
    """The mean over micro-batches of the mean over the labels of all sequences in each."""
    batch = sequences(run, step)
    parts = [batch[n * run.data : (n + 1) * run.data] for n in range(run.micro_batches)]
    return torch.stack([sum_of_losses(run, model, part) / count_of_labels(part) for part in parts]).mean()


def sum_of_losses(run: Run, model: Decoder, part: Sequence[Packed]) -> Tensor:
    total = torch.zeros(())
    for s in part:
        mask = df.Causal() & df.Documents(s.cu_seqlens) if run.documents else df.Causal()
        logits = model(s.tokens, run.seq_len, mask).flatten(0, 1)
        total = total + F.cross_entropy(logits, s.labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total


def count_of_labels(part: Sequence[Packed]) -> int:
    return sum(int((s.labels != IGNORED).sum()) for s in part)


@torch.no_grad()
def nudge(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
        p.mul_(1 + torch.finfo(p.dtype).eps * signs)


def assert_as_alone(run: Run, outcomes: Sequence[Outcome]) -> None:
    """Assert that losses and weights of every rank equal those of one device, up to rounding.

    The effect of rounding is measured by a run whose weights are moved by one rounding unit before every step.
    """
    (exact, norms), (nudged, _) = alone(run), alone(run, nudged=True)
    if run.clip:
        assert min(norms) < 0.97 * run.clip and max(norms) > 1.03 * run.clip, "all steps or none are clipped"
    unit = torch.finfo(torch.float32).eps
    limits = [SIGMAS * max(unit, difference) for difference in differences(nudged, exact)]
    seen: set[str] = set()
    for rank, outcome in enumerate(outcomes):
        assert len(outcome.losses) == run.steps
        seen |= outcome.weights.keys()
        for what, found, limit in zip(("losses", "weights"), differences(outcome, exact), limits, strict=True):
            assert found <= limit, f"{run}, rank {rank}: {what} are off by {found:.1e}, limit {limit:.1e}"
    assert seen == exact.weights.keys()


def differences(a: Outcome, b: Outcome) -> tuple[float, float]:
    """The largest relative difference of any loss, and of any weight's norm; NaN counts as infinite."""
    losses = torch.tensor(a.losses).double() / torch.tensor(b.losses).double() - 1
    weights = torch.stack([(w - b.weights[name]).norm() / b.weights[name].norm() for name, w in a.weights.items()])
    return float(losses.abs().nan_to_num(torch.inf).max()), float(weights.nan_to_num(torch.inf).max())


def join_deepspeed() -> None:
    """What a launcher, and a machine with a compiler, would have done for a process of `tests.ranks`."""
    import deepspeed

    os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": str(dist.get_world_size())}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for 20 seconds otherwise
    deepspeed.init_distributed("gloo", verbose=False)
