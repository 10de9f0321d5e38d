"""The record of a step: values of modules by name, and gradients; nothing else changes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distflash.recording import Recorder, nudge


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=False)) + self.second(x)


def recorded(net, root=None, layers=True):
    x = torch.ones(2, 4)
    with Recorder(root, layers, {}) as recorder:
        loss = net(x).sum()
        assert not recorder.has_gradients()
        loss.backward()
        assert recorder.has_gradients()
        return recorder.run(loss, [], None)


def test_events_are_named_and_in_order():
    """Recomputing a layer in backward adds none."""
    run = recorded(Net())
    assert [(event.name, event.returned) for event in run.events] == [
        ("first", False),
        ("first", True),
        ("second", False),
        ("second", True),
        ("second (call 2)", False),
        ("second (call 2)", True),
        ("model", True),
    ]
    assert list(recorded(Net(), layers=False).events) == [event for event in run.events if event.name == "model"]
    where = [event.where for event in run.events]
    assert where[1:3] == ["first", "model, in what it does before it calls second"]


def test_names_are_those_without_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    plain, wrapped = recorded(Net()), recorded(Wrapper(Net()))
    assert (
        list(wrapped.gradients)
        == list(plain.gradients)
        == ["first.weight", "first.bias", "second.weight", "second.bias"]
    )
    assert wrapped.averaged and not plain.averaged
    assert wrapped.parts == plain.parts == {name: pytest.approx(float(g.norm())) for name, g in plain.gradients.items()}


def test_gradients_and_weights_are_left_as_they_were():
    net = Net()
    flat = torch.arange(4.0)
    net.first.bias.grad = flat.view(4)  # a view of a buffer of gradients
    run = recorded(net)
    assert torch.equal(run.gradients["first.bias"], recorded(Net()).gradients["first.bias"])
    assert net.first.bias.grad.data_ptr() == flat.data_ptr() and torch.equal(flat, torch.arange(4.0))
    assert net.second.weight.grad is None

    before = [p.detach().clone() for p in net.parameters()]
    undo = nudge([net], 2**-20, seed=1)
    moved = [(p.detach() / old - 1).abs() for p, old in zip(net.parameters(), before, strict=True)]
    assert all(torch.allclose(x, torch.full_like(x, 2**-20), rtol=0.2) for x in moved)
    undo()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_only_the_model_that_was_asked_for_is_recorded():
    net = Net()
    run = recorded(lambda x: nn.Linear(4, 4)(net(x)), root=net, layers=False)
    assert [event.name for event in run.events] == ["model"] and run.roots == [net]
    both = recorded(lambda x: nn.Linear(4, 4)(net(x)), layers=False)
    assert [event.name for event in both.events] == ["model", "Linear#1"]
    assert "Linear#1.weight" in both.gradients
