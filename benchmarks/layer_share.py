"""The fraction of training time spent in given layers: forward, recomputation, and backward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class LayerShare:
    """Watches layers that take hidden states and return hidden states.

    On GPUs the time is the device's, between two events on its stream. Make it after `gather_layers`, so that what
    gathers and scatters is counted with the layer.

    Args:
        layers: none within another.
        device: where they run.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self._spans: list[tuple[Any, Any]] = []
        for layer in layers:
            layer.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            layer.register_forward_hook(self._after, with_kwargs=True)

    def of(self, seconds: float) -> float:
        """The share of the layers in ``seconds``, in which all they did has been done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3 / seconds
        return sum(end - begin for begin, end in self._spans) / seconds

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next(x for x in kwargs.values() if isinstance(x, Tensor))
        layer._begin = self._mark()  # type: ignore[assignment]
        layer._hidden = hidden if hidden.requires_grad else None  # type: ignore[assignment]

    def _after(self, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        self._spans.append((layer._begin, self._mark()))
        out = output[0] if isinstance(output, tuple) else output
        hidden, layer._hidden = layer._hidden, None
        if hidden is None or not out.requires_grad:
            return
        began: list[Any] = []
        # The first has a gradient where backward enters the layer, the second where it leaves it.
        out.register_hook(lambda gradient: began.append(self._mark()))
        hidden.register_hook(partial(self._backward, began))

    def _backward(self, began: list[Any], gradient: Tensor) -> None:
        self._spans.append((began.pop(), self._mark()))
