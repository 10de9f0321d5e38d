"""Random calls of `df.attention` against dense float64: forward, lse and all gradients.

    PYTHONPATH=. python tests/fuzz.py --minutes 10 --seed 1           # simulated ranks, on the CPU
    PYTHONPATH=. python tests/fuzz.py --cases 500 --seed 1 --real 3   # three processes on gloo
    PYTHONPATH=. python tests/fuzz.py --cases 1000 --seed 1 --device cuda
    PYTHONPATH=. python tests/fuzz.py --seed 1 --case 17              # one case again

float64 must be exact to its rounding. Other dtypes may have a few times the error of a dense computation in the same
dtype, see `assert_as_exact_as_dense`. Every failure is printed with the command that repeats it; exit code 1 then.
"""

from __future__ import annotations

import argparse
import os
import sys
import time


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Random calls of df.attention against dense float64.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="how many; 1000 unless --minutes says how long")
    parser.add_argument("--minutes", type=float, help="how long at most")
    parser.add_argument("--case", type=int, help="this one only, with the whole traceback")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--real", type=int, help="so many processes on gloo in place of simulated ranks")
    parser.add_argument("--jobs", type=int, help="processes that share the cases; 1 on the CPU, else one a core")
    options = parser.parse_args(arguments)
    if options.real and options.device == "cuda":
        parser.error("--real is for the CPU; tests/gpu/test_ring.py runs real ranks on GPUs")
    if options.cases is None and options.minutes is None:
        options.cases = 1000
    if options.jobs is None or options.case is not None:
        options.jobs = os.cpu_count() if options.device == "cuda" and options.case is None else 1
    return options


def main() -> None:
    options = parse()
    # Read when torch is first imported, and triton, which torch does here and there, and when cuBLAS is first used.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from tests.fuzzing import Options, run

    start = time.monotonic()
    tally = run(Options(**vars(options)))
    print(f"seed {options.seed}, {time.monotonic() - start:.0f} s: {tally}", flush=True)
    sys.exit(bool(tally.failed))


if __name__ == "__main__":
    main()
