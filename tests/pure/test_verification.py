"""`df.verify` on simulated ranks: right models pass, and the bound is tight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import distflash as df
from distflash.kernels import Reference

SEQ_LEN = 61


class Attention(nn.Module):
    """With biases: that of the keys has a gradient of zero, so that all of what is computed is rounding."""

    def __init__(self, dim, cp):
        super().__init__()
        self.cp, self.qkv, self.o = cp, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
        out = df.attention(q, k, v, mask=df.Causal(), cp=self.cp, seq_len=SEQ_LEN)
        return x + self.o(out.flatten(2))


class Model(nn.Module):
    def __init__(self, cp, dim=16):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, dim), nn.Linear(dim, 50)
        self.layers = nn.ModuleList(Attention(dim, cp) for _ in range(2))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


def verified(world_size, dtype, autocast=False, quiet=True, scale=1.0):
    batch = torch.randint(0, 50, (2, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))

    def rank(transport):
        cp = df.ContextParallel(transport, df.Striped(), kernel=Reference())
        model = Model(cp).to(dtype)

        def step(batch, given):
            tokens, labels = batch[:, :-1], batch[:, 1:]
            if given is not None:
                tokens, labels = given.shard(tokens), given.shard(labels)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(tokens)
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            if given is None:
                return total / labels.numel()
            return given.mean(total * scale, labels.numel(), reduction="sum")

        return df.verify(step, batch, cp, reduction="sum", quiet=quiet)

    reports = df.transport.Simulator(world_size).run(rank)
    assert all(report == reports[0] for report in reports)
    return reports[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_gradient_of_zero_and_recomputed_layers_are_right(world_size, dtype):
    report = verified(world_size, dtype)
    assert report.ok, str(report)


def test_autocast_is_right():
    report = verified(3, torch.float32, autocast=True)
    assert report.ok, str(report)


def test_the_bound_is_as_tight_as_the_dtype():
    """A loss that is off by 1e-5 is found in float32, and hidden by bfloat16's own rounding."""
    assert not verified(2, torch.float32, scale=1 + 1e-5).ok
    assert not verified(2, torch.float64, scale=1 + 1e-13).ok
    assert verified(2, torch.bfloat16, scale=1 + 1e-5).ok


def test_the_first_rank_prints(capsys):
    report = verified(3, torch.float32, quiet=False)
    assert capsys.readouterr().out == f"{report}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"step": None}, "step: expected a function"),
        ({"cp": None}, "cp: expected a ContextParallel"),
        ({"model": "gpt"}, r"model: expected a torch\.nn\.Module"),
        ({"reduction": "average"}, "reduction: expected 'sum', 'mean' or None"),
    ],
)
def test_other_kinds_of_arguments_are_refused(arguments, words):
    right = {"step": lambda batch, cp: 0.0, "batch": None, "cp": df.ContextParallel(df.transport.Alone())}
    with pytest.raises(ValueError, match=words):
        df.verify(**{**right, **arguments})
