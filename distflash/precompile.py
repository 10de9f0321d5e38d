"""`python -m distflash compile`: fills triton's cache for a GPU that need not be there, as when an image is built."""

from __future__ import annotations

import argparse
import time

import torch

from distflash import validation, warming
from distflash.agreement import Agreement
from distflash.call import Calls
from distflash.kernels import Hopper, Kernel, Triton
from distflash.kernels.machine import MACHINES, Machine, machine_of
from distflash.layouts import Contiguous, Layout, Striped, Zigzag
from distflash.mask_algebra import Mask
from distflash.masks import Causal, Full, Window
from distflash.schedules import Ring
from distflash.transport import Alone, Silent, Transport

_META = torch.device("meta")
LAYOUTS: dict[str, Layout] = {"zigzag": Zigzag(), "contiguous": Contiguous(), "striped": Striped()}


def precompile(options: argparse.Namespace) -> int:
    """Compile what calls of all ranks launch; 1 where that fails."""
    machine = MACHINES[options.gpu] if options.gpu else _machine_here()
    if machine is None:
        print("compile: there is no GPU here; name one: --gpu sm_90, say")
        return 1
    errors: list[str] = []
    for seq_len in options.seq_lens:
        began = time.monotonic()
        for rank in range(options.ranks):
            try:
                errors += warming.compile_all(_rehearsal(options, machine, rank, seq_len), machine)
            except (OSError, ValueError) as raised:
                errors.append(str(raised))
        print(f"S = {seq_len}, {options.ranks} ranks: {time.monotonic() - began:.1f} s")
    for error in dict.fromkeys(errors):
        print(f"compile: {error}")
    return int(bool(errors))


def _machine_here() -> Machine | None:
    return machine_of(torch.device("cuda", 0)) if torch.cuda.is_available() else None


def _rehearsal(options: argparse.Namespace, machine: Machine, rank: int, seq_len: int) -> warming.Rehearsal:
    """Of one rank's call."""
    layout, ranks = LAYOUTS[options.layout], options.ranks
    transport: Transport = Silent(rank, ranks, _META) if ranks > 1 else Alone(device=_META)
    calls = Calls(transport, layout, Ring(), None, Agreement(transport, every_call=False))
    tokens, values = layout.length(seq_len, ranks, rank), options.value_head_dim or options.head_dim
    sides = (options.heads, options.head_dim), (options.kv_heads, options.head_dim), (options.kv_heads, values)
    shapes = warming.Shapes(*((options.batch, tokens, *side) for side in sides))
    masks: dict[str, Mask] = {"causal": Causal(), "full": Full(), "window": Window(options.window - 1, 0)}
    asked = warming.specification_of(
        calls,
        shapes,
        getattr(torch, options.dtype),
        masks[options.mask],
        seq_len,
        not options.forward_only,
        dropout_p=options.dropout_p,
        max_logits=options.max_logits,
    )
    known = Hopper(deterministic=options.deterministic), Triton()
    kernels = [rehearsed for k in known if (rehearsed := k.rehearsing(machine)) is not None]
    kernel: Kernel | str = validation.kernel_for(asked.problem, None, kernels)
    if isinstance(kernel, str):
        raise ValueError(kernel)
    return warming.Rehearsal(calls, kernel, asked)
