"""Parsing of command lines, and options that all jobs share.

torch and tyro are imported when they are needed, so that `--help` is quick and `doctor` works without the extra.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import MISSING, Field, field
from typing import TYPE_CHECKING, Any, TypeVar

import distflash as df

if TYPE_CHECKING:
    import torch

Options = TypeVar("Options")


def parse(
    options: type[Options], arguments: list[str] | None, prog: str | None = None, description: str | None = None
) -> Options:
    """Parse the command line, or `arguments`. Only rank 0 prints errors.

    prog, description: for the help; by default the script's name and the docstring of `options`.
    """
    import tyro

    first = int(os.environ.get("RANK", 0)) == 0
    config = (tyro.conf.OmitArgPrefixes,)
    try:
        return tyro.cli(
            options, args=arguments, config=config, console_outputs=first, prog=prog, description=description
        )
    except SystemExit as refusal:
        if refusal.code and not first:
            time.sleep(10)  # the launcher stops all ranks when one exits: let rank 0, which prints, be the first
        raise


def whole_sentences(options: type[Options]) -> type[Options]:
    """Join the lines of the fields' docstrings, so that `--help` wraps them at the terminal's width.

    tyro would keep the line breaks of the source. To be applied before `dataclass`.
    """
    import docstring_parser

    for found in docstring_parser.parse_from_object(options).params:
        default: Any = options.__dict__.get(found.arg_name, MISSING)
        own: Any = default if isinstance(default, Field) else field(default=default)
        own.metadata = {**own.metadata, "help": " ".join((found.description or "").split())}
        setattr(options, found.arg_name, own)
    return options


def require(condition: bool, argument: str, came: object, expected: str) -> None:
    """Raise a ValueError that names `argument`, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{argument}: got {came}, expected {expected}")


def positive(argument: str, came: float) -> None:
    require(0 < came < math.inf, argument, came, "a positive, finite number")


def printable(text: object) -> str:
    """The text with escapes for bytes of file names that are not UTF-8, so that terminals and logs accept it."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Placed:
    """Base class of a job's options: what follows from --device, --dtype and --layout."""

    device: str
    dtype: str
    threads: int
    layout: str

    def check_device(self) -> None:
        """Raise a ValueError if this host does not have the device, or too few for its ranks."""
        import torch

        cuda = torch.cuda.is_available()
        require(self.device != "cuda" or cuda, "--device", "cuda", "cpu or auto: torch sees no GPU on this machine")
        ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        require(
            self.device_type == "cpu" or ranks <= gpus,
            "--nproc-per-node",
            ranks,
            f"at most {gpus}, a GPU for each rank of a host; or pass --device cpu",
        )

    def check_ranks(self, world: int) -> None:
        """Raise a ValueError if the job does not run on `world` ranks. Called before they start, and on each."""

    def before_main(self) -> None:
        """Called before the job's main module is imported."""

    @property
    def device_type(self) -> str:
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    @property
    def compute_dtype(self) -> torch.dtype:
        import torch

        if self.dtype == "auto":
            return torch.bfloat16 if self.device_type == "cuda" else torch.float32
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def make_layout(self) -> df.Layout:
        layouts: dict[str, df.Layout] = {
            "balanced": df.Balanced(df.Causal()),
            "zigzag": df.Zigzag(),
            "contiguous": df.Contiguous(),
            "striped": df.Striped(),
        }
        return layouts[self.layout]
