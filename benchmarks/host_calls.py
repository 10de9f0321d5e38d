"""How many Python function calls does a call of attention make? A measure of host overhead that is not timed.

    python -m benchmarks.host_calls            # count and report
    python -m benchmarks.host_calls --check    # and fail where a count is above the committed one
    python -m benchmarks.host_calls --write    # commit the counts anew

No GPU is needed: kernels are compiled, but launches do nothing (`stub`), and other ranks are simulated by `Silent`.
Counts are the same on every machine with the same versions of torch and triton. The first calls, which compile and
plan, are not counted.

Each row is a kernel, a number of ranks and a pass. ``step`` is the difference between a ring of four ranks and one of
three. Calls within `torch.distributed` are not counted, since they depend on the backend. Launches go through
Triton's launcher, which runs more Python than a packed launch does on a GPU (`distflash.kernels.packed`).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import triton

import distflash as df
from benchmarks import stub
from distflash.kernels import Kernel
from tools.offline import table

TABLE = Path(__file__).parent / "results" / "host_calls.json"
RANKS = (1, 2, 3, 4)
FORWARD, BOTH, STEP = "forward", "forward and backward", "step"
TOKENS = 512  # of each rank: enough for kernels not to take another way for few keys
WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """Calls of Python functions in one call of attention, or in one further ring step."""

    kernel: str
    ranks: str
    which: str
    calls: int

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.ranks} ranks, {self.which}"


class Calls:
    """Counts the Python functions that run inside, by file and name."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __enter__(self) -> Calls:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        del self.found[_place(type(self).__exit__.__code__)]

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self.found[_place(frame.f_code)] += 1


def _place(code: Any) -> str:
    return f"{'/'.join(Path(code.co_filename).parts[-3:])}:{code.co_name}"


def passes(kernel: Kernel, ranks: int) -> dict[str, Callable[[], object]]:
    """Both passes of rank 0 of so many, causal, 8 query heads on 2 key heads of 128."""
    device = torch.device("cpu")
    transport = df.transport.Silent(0, ranks, device) if ranks > 1 else df.transport.Alone()
    cp, mask = df.ContextParallel(transport, kernel=kernel), df.Causal()
    q, k, v = (torch.zeros(1, TOKENS, heads, 128, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2))
    dout = torch.zeros_like(q, requires_grad=False)

    def forward() -> torch.Tensor:
        return df.attention(q, k, v, mask=mask, cp=cp)

    return {FORWARD: torch.no_grad()(forward), BOTH: lambda: torch.autograd.grad(forward(), (q, k, v), dout)}


def count(call: Callable[[], object]) -> Counter[str]:
    """Of one call, like those that came before."""
    for _ in range(WARM_UP):
        call()
    gc.disable()  # what it finds it would find at another moment the next time
    try:
        with Calls() as first:
            call()
        with Calls() as second:
            call()
    finally:
        gc.enable()
    assert first.found == second.found, f"not the same twice: {first.found - second.found}"
    return second.found


def measure(name: str) -> tuple[list[Row], Counter[str]]:
    """The rows of a kernel, and the functions that two ranks run most, forward and backward."""
    stub.start()
    found = {(n, which): count(call) for n in RANKS for which, call in passes(stub.KERNELS[name], n).items()}
    rows = [Row(name, str(n), which, calls.total()) for (n, which), calls in found.items() if n < 3]
    rows += [Row(name, STEP, which, found[4, which].total() - found[3, which].total()) for which in (FORWARD, BOTH)]
    return rows, found[2, BOTH]


def faults(rows: list[Row], recorded: dict[str, int]) -> list[str]:
    """Counts above the committed ones, and rows that are not the same."""
    now = {row.name: row.calls for row in rows}
    missing = [f"{name}: in the table, and not counted any more" for name in recorded if name not in now]
    new = [f"{name}: not in the table" for name in now if name not in recorded]
    more = [
        f"{name}: {calls} calls of Python functions, {recorded[name]} in the table"
        for name, calls in now.items()
        if calls > recorded.get(name, calls)
    ]
    return missing + new + more


def read_table() -> dict[str, int]:
    return {Row(**row).name: row["calls"] for row in json.loads(TABLE.read_text())["rows"]}


def write_table(rows: list[Row]) -> None:
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    head = json.dumps({"torch": torch.__version__, "triton": triton.__version__})
    TABLE.write_text(f'{head[:-1]},\n "rows": [\n  {lines}\n ]}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail above the committed counts")
    what.add_argument("--write", action="store_true", help="commit the counts")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="name the N functions that run most often")
    options = parser.parse_args()
    rows: list[Row] = []
    for name in stub.KERNELS:
        found, most = measure(name)
        rows += found
        for place, calls in most.most_common(options.most):
            print(f"{name}, 2 ranks, {BOTH}: {calls:5} {place}")
    print(f"calls of Python functions, torch {torch.__version__}, triton {triton.__version__}")
    print(table([asdict(row) for row in rows]))
    if options.write:
        write_table(rows)
    wrong = faults(rows, read_table()) if options.check else []
    for fault in wrong:
        print(f"too many: {fault}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
