"""The options of `python -m distflash compile`, without what they stand for: the command's help loads no torch."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a call is like, by the names of a command line."""
    parser.add_argument(
        "--gpu", choices=("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), help="by default the GPU of this machine"
    )
    parser.add_argument("--ranks", type=int, default=1, help="that share a sequence, on one host (1)")
    parser.add_argument("--seq-lens", type=int, nargs="+", required=True, metavar="S", help="global lengths")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--value-head-dim", type=int, help="where values have another")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--mask", choices=("causal", "full", "window"), default="causal")
    parser.add_argument("--window", type=int, default=4096, help="keys that a query sees, its own among them (4096)")
    parser.add_argument("--layout", choices=("zigzag", "contiguous", "striped"), default="zigzag")
    parser.add_argument("--dropout-p", type=float, default=0.0, help="the rate of attention dropout (0)")
    parser.add_argument("--max-logits", action="store_true", help="with return_max_logits=True")
    parser.add_argument("--deterministic", action="store_true", help="with kernel=Hopper(deterministic=True)")
    parser.add_argument("--forward-only", action="store_true", help="no backward follows")
