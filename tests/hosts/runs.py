"""Training data and settings for tests of host libraries, without importing these."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


def call(module: str, function: str, *args: Any) -> Any:
    """Runs as a rank: ``module.function(*args)``."""
    return getattr(import_module(module), function)(*args)


@dataclass(frozen=True)
class TitanRun:
    """A run of torchtitan's trainer. options: fields of its configuration by their path."""

    context: int = 1
    data: int = 1
    tensor: int = 1
    backend: str = "partial_dtensor"
    packed: bool = True
    batch: int = 2
    steps: int = 4
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def ranks(self) -> int:
        return self.context * self.data * self.tensor


@dataclass(frozen=True)
class MegatronRun:
    """Steps of a GPT model of Megatron. documents: their lengths. options: fields of ``TransformerConfig``."""

    context: int = 1
    documents: tuple[int, ...] = ()
    steps: int = 3
    options: tuple[tuple[str, Any], ...] = ()
