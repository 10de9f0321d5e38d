"""Every kernel under compute-sanitizer, on one GPU: rings of simulated ranks, forward and backward, over a small grid.

    python tools/sanitize.py                     # memcheck, without torch's memory pool, inside which it sees nothing
    python tools/sanitize.py --tool synccheck    # or initcheck, or racecheck, which takes longest
    python tools/sanitize.py --dims 64/64 --tokens 2048

Exits with 0 if the tool found nothing. initcheck does not see what the copy engine writes, and so takes the output of
the Hopper kernel for memory that nobody wrote: it runs the portable kernel only (tests poison all memory instead).
What racecheck reports in the Hopper kernels is explained in
``distflash/kernels/hopper/common.py``; `tools.ptx` checks the order that the explanation rests on.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DIMS = ("40/40", "64/64", "128/128", "192/128", "256/256")
TOKENS = (2048, 1501)  # for which tensors end where a page does, and do not
KERNELS = ("hopper", "one program", "triton")


def main() -> None:
    arguments = parse()
    if arguments.inside:
        return grid(arguments)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", arguments.tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += [sys.executable, __file__, "--inside", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment, check=False).returncode)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "synccheck", "initcheck"), default="memcheck")
    parser.add_argument("--dims", nargs="+", default=DIMS, metavar="D_QK/D_V")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--ranks", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="all by default; for initcheck the portable one")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.kernels = arguments.kernels or (KERNELS[-1:] if arguments.tool == "initcheck" else KERNELS)
    return arguments


def grid(arguments: argparse.Namespace) -> None:
    for case in itertools.product(arguments.kernels, arguments.dims, arguments.tokens, arguments.ranks):
        print(*case, flush=True)
        ring(*case)


def ring(name: str, dims: str, tokens: int, ranks: int) -> None:
    """One call of simulated ranks, forward and backward."""
    import torch

    import distflash as df

    # With one program, few keys are enough for some key heads to be computed last.
    kernels = {
        "hopper": df.kernels.Hopper(),
        "one program": df.kernels.Hopper(margin=torch.cuda.get_device_properties(0).multi_processor_count - 1),
        "triton": df.kernels.Triton(),
    }
    d_qk, d_v = map(int, dims.split("/"))
    mask = df.Causal() & df.Documents([0, tokens // 3, tokens // 2 + 7, tokens])
    shapes = ((4, d_qk), (2, d_qk), (2, d_v), (4, d_v))
    whole = [torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for heads, dim in shapes]

    def rank(transport: df.transport.SimulatedTransport) -> None:
        cp = df.ContextParallel(transport, kernel=kernels[name])
        with torch.autograd.set_multithreading_enabled(False):  # or one thread runs the backward of all ranks
            q, k, v, dout = (cp.shard(x).detach().requires_grad_() for x in whole)
            for m in (df.Causal(), mask):
                out = df.attention(q, k, v, mask=m, cp=cp, seq_len=tokens)
                torch.autograd.grad(out, (q, k, v), dout)

    df.transport.Simulator(ranks).run(rank)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
