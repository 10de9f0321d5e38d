"""The benchmark of trainers: time per layer, and detection of wrong runs."""

import time

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.layer_share import LayerShare
from benchmarks.sft import BY_HAND, TRAINER, problems

NAP = 0.02


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(NAP)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * NAP)
        return 2 * gradient


class Layer(nn.Module):
    def forward(self, hidden_states):
        return Slow.apply(hidden_states)


def test_a_layers_time_is_that_of_its_passes():
    watched, other = Layer(), Layer()
    share = LayerShare([watched], torch.device("cpu"))
    x = torch.ones(3, requires_grad=True)
    began = time.perf_counter()
    y = checkpoint(lambda x: watched(hidden_states=other(2 * x)).square(), x, use_reentrant=False)
    y.sum().backward()
    seconds = time.perf_counter() - began
    # Forward, recomputed forward, and backward, of which the other layer has as much.
    assert 4 * NAP <= share.of(1.0) < seconds - 4 * NAP
    assert share.of(seconds) < 0.6


def row(**changes):
    ways = {"losses": [2.0, 1.0], "tokens": [512, 500]}
    return {name: {TRAINER: changes.get(name, values), BY_HAND: values} for name, values in ways.items()}


def test_runs_that_differ_are_named():
    assert problems(row(), torch.float32) == []
    assert problems(row(losses=[2.0, 1.01]), torch.float32)[0].startswith("losses differ by 1.0e-02")
    assert problems(row(tokens=[512, 512]), torch.float32)[0].startswith("other sequences")
    assert problems(row(losses=[2.0, float("nan")]), torch.float32)
