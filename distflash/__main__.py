"""The command line: `python -m distflash`, or `distflash` where it is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distflash import __version__
from distflash.compile_options import add_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or 1 where a check found a fault."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "compile":
        from distflash.precompile import precompile

        return precompile(options)
    from distflash.doctor import diagnose  # here, since it loads torch

    return diagnose(device=options.device, timeout=options.timeout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distflash",
        description=f"distflash {__version__}: exact attention over many GPUs.",
        epilog="Over several ranks: torchrun --nproc-per-node 8 -m distflash doctor",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    doctor = commands.add_parser(
        "doctor",
        help="check versions, GPUs, links, kernels and attention on this machine; exit code 1 on a fault",
        description="Check versions, GPUs, the links between ranks, every kernel, and attention over all ranks. "
        "Alone or under torchrun, where the first rank prints what all have found. Exit code 1 on a fault.",
    )
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
    sys.exit(main())
