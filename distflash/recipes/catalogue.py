"""A table of the package's jobs and of the extras that each needs. Jobs are imported only when they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distflash.recipes.options import Placed

# The packages of an extra that a job cannot run without, by import name.
PACKAGES = {
    "train": ("matplotlib", "numpy", "rich", "safetensors", "tyro"),
    "deepspeed": ("deepspeed",),
    "trainer": ("accelerate", "transformers"),
}


@dataclass(frozen=True)
class Recipe:
    """A job, as a command of `distflash` and as a script.

    Attributes:
        name: of the command.
        line: one line of help.
        module: in `distflash.recipes`. Its `main` takes the options and returns an exit code.
        options: a module in `distflash.recipes`, and the options' class in it.
        extras: the extras of distflash that the job needs.
    """

    name: str
    line: str
    module: str
    options: tuple[str, str]
    extras: tuple[str, ...] = ("train",)

    @property
    def script(self) -> str:
        """The file name of the job as a script."""
        return f"{self.name.replace('-', '_')}.py"

    def check_extras(self) -> None:
        """Raise a ValueError if a package that the job needs is not installed."""
        missing = [name for extra in self.extras for name in PACKAGES[extra] if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"{self.name}: not installed: {', '.join(missing)}; pip install 'distflash[{','.join(self.extras)}]'"
            )

    def load_options(self) -> type[Placed]:
        """The class of the options. Does not import torch."""
        module, name = self.options
        return getattr(import_module(f"distflash.recipes.{module}"), name)

    def load_main(self) -> Callable[[Any], int]:
        return import_module(f"distflash.recipes.{self.module}").main


RECIPES = (
    Recipe(
        "train",
        "train a byte-level decoder, each sequence over all ranks",
        "trainer",
        ("config", "TrainConfig"),
    ),
    Recipe(
        "train-deepspeed",
        "train it with DeepSpeed: ZeRO, pipelines",
        "deepspeed_trainer",
        ("deepspeed_config", "DeepSpeedConfig"),
        ("train", "deepspeed"),
    ),
    Recipe(
        "train-transformers",
        "train a Llama with Transformers' Trainer",
        "transformers_trainer",
        ("transformers_config", "TransformersConfig"),
        ("train", "trainer"),
    ),
    Recipe(
        "generate",
        "continue a text with what train has trained",
        "generator",
        ("inference_config", "GenerateConfig"),
    ),
    Recipe(
        "evaluate",
        "measure it on held-out text: bits per byte, loss by position",
        "evaluator",
        ("inference_config", "EvaluateConfig"),
    ),
    Recipe(
        "uptrain",
        "give it fewer key heads, and train it on",
        "uptraining",
        ("uptrain_config", "UptrainConfig"),
    ),
    Recipe(
        "verify",
        "compare the first batch of train, sharded and unsharded; exit code 1 where they differ",
        "verify_job",
        ("verify_config", "VerifyConfig"),
    ),
)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
