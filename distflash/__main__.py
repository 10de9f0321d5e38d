"""The command line: `distflash`, or `python -m distflash`, alone or under torchrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from distflash import __version__
from distflash.compile_options import add_options
from distflash.recipes.catalogue import BY_NAME, RECIPES
from distflash.recipes.process import end_with
from distflash.recipes.ranks import HELP, ranks_to_start, start_ranks


def console() -> NoReturn:
    """The program `distflash`."""
    end_with(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 where a check found a fault, 2 where something is refused."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in BY_NAME:
        from distflash.recipes.console import run

        return run(BY_NAME[given[0]], given[1:])
    parser = _parser()
    options = parser.parse_args(given)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "compile":
        from distflash.precompile import precompile

        return precompile(options)
    try:
        return _copy(options) if options.command == "copy" else _doctor(options, given)
    except ValueError as error:
        print(f"distflash {options.command}: {error}", file=sys.stderr)
        return 2


def _copy(options: argparse.Namespace) -> int:
    from distflash.recipes.copying import copy

    path = copy(BY_NAME[options.recipe], options.to)
    print(f"{path} is yours: torchrun --standalone --nproc-per-node 2 {path} --help")
    return 0


def _doctor(options: argparse.Namespace, given: list[str]) -> int:
    import torch  # here, since `--help` needs none

    count = ranks_to_start(options.ranks, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if count > 1:
        return start_ranks(count, given)
    from distflash.doctor import diagnose

    return diagnose(device=options.device, timeout=options.timeout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distflash",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=24),
        description=f"distflash {__version__}: exact attention over many GPUs.",
        epilog="`distflash COMMAND --help` lists the options of a command. A job starts its ranks itself, one a GPU "
        "or as many as --ranks says; several machines are started by torchrun: torchrun ... -m distflash train",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for recipe in RECIPES:
        commands.add_parser(recipe.name, help=recipe.line)
    copy = commands.add_parser(
        "copy",
        help="write a job as a script to be changed",
        description="Write the main module of a job as a script of your own, which torchrun starts and which imports "
        "the rest from distflash.recipes.",
    )
    copy.add_argument("recipe", choices=tuple(BY_NAME), metavar="RECIPE", help=", ".join(BY_NAME))
    copy.add_argument("to", nargs="?", type=Path, metavar="TO", help="a file or a folder (a file in this folder)")
    doctor = commands.add_parser(
        "doctor",
        help="check versions, GPUs, links, kernels and attention on this machine; exit code 1 on a fault",
        description="Check versions, GPUs, the links between ranks, every kernel, and attention over all ranks. "
        "The first rank prints what all have found. Exit code 1 on a fault.",
    )
    doctor.add_argument("--ranks", type=int, metavar="N", help=HELP)
    doctor.add_argument("--device", choices=("cuda", "cpu"), help="by default cuda where torch sees a GPU")
    doctor.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="after which a silent rank is a fault (120)"
    )
    add_options(
        commands.add_parser(
            "compile",
            help="compile the kernels of a call beforehand, with or without a GPU",
            description="Compile all that calls of attention launch, for every rank, into triton's cache "
            "(TRITON_CACHE_DIR), where the first calls then find it. No GPU is needed, as when an image is built.",
        )
    )
    return parser


if __name__ == "__main__":
    console()
