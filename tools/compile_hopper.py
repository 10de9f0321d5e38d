"""Compile every shipped configuration of the Hopper kernels without a GPU, and hold the result against a table.

    python -m tools.compile_hopper            # compile and report, with any triton; --quick for fewer
    python -m tools.compile_hopper --check    # and fail where the machine code is worse than the table's
    python -m tools.compile_hopper --write    # write the table anew

What can be seen in machine code, and costs much, is a spilled register (LDL and STL, the local loads and stores) in a
loop around tensor-core instructions, and an assembler that gives up on overlapping these (``serialised``). ``loop``
counts the local loads and stores that every tile runs into, ``border`` those that tiles inside all intervals jump over,
and ``local`` all of the kernel, most of them once a block. Each that remains has to be explained in `EXPLAINED`. The
table belongs to one version of triton, the one that continuous integration installs; other versions are only reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from distflash.dropout import Dropout
from distflash.kernels.base import KeyGradient, Keys, Scores
from distflash.kernels.hopper import launches
from distflash.kernels.hopper.sums import query_sums, semaphores
from distflash.kernels.hopper.tiles import (
    KEYS,
    ORDERED,
    QUERIES,
    BackwardTile,
    ForwardTile,
    backward_tile,
    forward_tile,
)
from distflash.kernels.launch import Launch
from distflash.plan import Pass
from distflash.turns import turns_of
from tools.offline import Assembly, TargetOnly, Tensors, assemble, count_local, table
from tools.ptx import unordered_arrivals
from tools.sass import main_loops

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "hopper_sm90.json"
MANY = float(2**20)  # keys that a query sees
PROGRAMS = 132  # multiprocessors of an H100 or H200
COUNTS = ("registers", "shared", "local", "loop", "border", "serialised")  # less is better


@dataclass(frozen=True)
class Configuration:
    """One configuration.

    Attributes:
        kernel: forward, backward, or round, which brings dQ from its sums to the inputs' dtype.
        long: queries see many keys, for which there may be tiles of their own.
        two: keys of two sources in one pass.
        wide: dK and dV in float32, as the passes of a ring write them.
        dropout: of tokens whose positions are consecutive within tiles, or ``anywhere``.
        maxima: the largest score of each row is written, too.
        ordered: dQ is added in order.
    """

    kernel: str
    d_qk: int
    d_v: int
    dtype: torch.dtype
    group: int = 1
    softcap: bool = False
    sinks: bool = False
    long: bool = False
    two: bool = False
    wide: bool = False
    dropout: bool = False
    anywhere: bool = False
    maxima: bool = False
    ordered: bool = False

    @property
    def in_quick(self) -> bool:
        return self.dtype == torch.bfloat16 or not (self.group > 1 or self.softcap or self.sinks)

    @property
    def special(self) -> str:
        special = "softcap", "sinks", "long", "two", "wide", "dropout", "anywhere", "maxima", "ordered"
        names = {n: getattr(self, n) for n in special}
        return " ".join([f"group {self.group}"] * (self.group > 1) + [name for name, has in names.items() if has])

    @property
    def tile(self) -> ForwardTile | BackwardTile:
        dims = self.d_qk, self.d_v
        if self.kernel == "forward":
            return forward_tile(*dims, MANY * self.long)
        return backward_tile(*dims, ordered=self.ordered)

    @property
    def dims(self) -> str:
        return f"{self.d_qk}/{self.d_v}"

    @property
    def element(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kernel, self.dims, self.element, self.special)))


@dataclass(frozen=True)
class Row:
    """What became of one shape; ``loops`` is the number of main loops, one a warpgroup."""

    kernel: str
    dims: str
    dtype: str
    special: str
    tile: str
    registers: int
    shared: int
    local: int
    loop: int
    border: int
    loops: int
    mma: int
    serialised: bool

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kernel, self.dims, self.dtype, self.special)))

    @property
    def places(self) -> dict[str, int]:
        """Where its local loads and stores are."""
        return {"loop": self.loop, "border": self.border, "outside": self.local - self.loop - self.border}


@dataclass(frozen=True)
class Explanation:
    """Why local loads and stores remain in a kernel at these head dims.

    Attributes:
        place: ``border``, or ``outside`` of main loops.
        special: only with these special cases; empty for any.
    """

    kernel: str
    dims: str
    place: str
    why: str
    special: str = ""

    def covers(self, row: Row, place: str) -> bool:
        same = (self.kernel, self.dims, self.place) == (row.kernel, row.dims, place)
        return same and self.special in row.special


MASKING = "Masking needs the ends of intervals beside the sums; tiles inside all intervals jump over it."
ONCE = "What a block needs after its last tile waits in memory, saved and restored once a block and not once a tile."
# None that every turn of a main loop executes: there is no reason that would be good enough.
EXPLAINED = (
    Explanation("forward", "64/64", "border", MASKING, special="long two"),
    Explanation("forward", "128/128", "outside", ONCE),
    Explanation("forward", "192/128", "outside", ONCE),
    Explanation("forward", "256/256", "outside", ONCE),
    Explanation("backward", "64/64", "border", MASKING, special="softcap"),
    Explanation("backward", "64/64", "outside", ONCE, special="softcap"),
    Explanation("backward", "128/128", "border", MASKING),
    Explanation("backward", "128/128", "outside", ONCE),
    Explanation("backward", "192/128", "outside", ONCE, special="softcap"),
    Explanation("backward", "192/128", "outside", ONCE, special="group"),
    Explanation("backward", "256/256", "outside", ONCE),
)


def shapes() -> Iterator[Configuration]:
    for dtype in (torch.bfloat16, torch.float16):
        for d in (64, 128):
            for long in (False, True):
                if long and forward_tile(d, d, MANY) == forward_tile(d, d, 0.0):
                    continue
                for special in ({}, {"group": 4}, {"softcap": True}, {"sinks": True}, {"two": True}):
                    yield Configuration("forward", d, d, dtype, long=long, **special)
            for wide in (False, True):
                for special in ({}, {"group": 4}, {"softcap": True}):
                    yield Configuration("backward", d, d, dtype, wide=wide, **special)
            for special in ({}, {"group": 4}, {"softcap": True}, {"wide": True}) if d in ORDERED else ():
                yield Configuration("backward", d, d, dtype, ordered=True, **special)
            yield Configuration("round", d, d, dtype)
        for dims in ((192, 128), (256, 256)):
            for two in (False, True):
                yield Configuration("forward", *dims, dtype, two=two)
            for special in ({}, {"group": 4}, {"softcap": True}, {"wide": True}):
                yield Configuration("backward", *dims, dtype, **special)
            yield Configuration("round", *dims, dtype)
    # float16 differs in nothing that a store of one number a row could change.
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256)):
        yield Configuration("forward", *dims, torch.bfloat16, maxima=True)
    yield Configuration("forward", 128, 128, torch.bfloat16, sinks=True, maxima=True)


def make_launch(shape: Configuration) -> Launch:
    """The launch that a call of this shape makes, on tensors without data."""
    t = Tensors.of(shape.d_qk, shape.d_v, shape.dtype, shape.group)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    scores = Scores(
        0.1,
        30.0 if shape.softcap else 0.0,
        sinks=t.per_head if shape.sinks else None,
        dropout=Dropout(6554, seed) if shape.dropout else None,
    )
    keys = Keys(t.k, t.v, replace(t.intervals, in_tiles=not shape.anywhere))
    if shape.kernel == "forward":
        sources = 2 if shape.two else 1
        each = Pass(0, (0,) * sources, (t.intervals,) * sources, begun=int(shape.two))
        into = replace(t.partial, maxima=t.partial.maximum if shape.maxima else None)
        return launches.forward(shape.tile, PROGRAMS, t.q, (keys,) * sources, each, scores, into)
    sums, counter = query_sums(t.q)
    if shape.kernel == "round":
        return launches.round_queries(sums, scores.scale, t.q)
    dtype = torch.float32 if shape.wide else shape.dtype
    share = KeyGradient(torch.empty_like(t.k, dtype=dtype), torch.empty_like(t.v, dtype=dtype))
    saved = replace(t.saved, dq_accum=sums, counter=counter, semaphores=semaphores(t.q))
    earlier = turns_of(t.intervals, KEYS, QUERIES).earlier if shape.ordered else None
    return launches.backward(shape.tile, PROGRAMS, saved, keys, scores, share, range(t.k.shape[2]), earlier)


def compile_shape(shape: Configuration) -> Row:
    made = make_launch(shape).compile()
    if unordered := unordered_arrivals(made.asm["ptx"]):
        raise ValueError(
            f"{shape.name}: {unordered} arrivals at a barrier are not ordered after other threads' accesses"
        )
    assembly = assemble(made.asm)
    always, sometimes, loops = in_loops(assembly)
    return Row(
        kernel=shape.kernel,
        dims=shape.dims,
        dtype=shape.element,
        special=shape.special,
        tile=" ".join(f"{name} {value}" for name, value in asdict(shape.tile).items() if value),
        registers=assembly.registers,
        shared=int(made.metadata.shared),
        local=assembly.local,
        loop=always,
        border=sometimes,
        loops=loops,
        mma=assembly.mma,
        serialised=assembly.serialised,
    )


def in_loops(assembly: Assembly) -> tuple[int, int, int]:
    """Local loads and stores that every turn of a main loop executes, those of some turns, and the number of loops."""
    loops = main_loops(assembly.instructions)
    always = sum(count_local(loop.always) for loop in loops)
    return always, sum(count_local(loop.sometimes) for loop in loops), len(loops)


def start() -> None:
    driver.set_active(TargetOnly(GPUTarget("cuda", 90, 32)))


def attempt(shape: Configuration) -> Row | str:
    """The row, or why there is none."""
    try:
        return compile_shape(shape)
    except Exception as error:  # of the compiler, of the assembler: whatever it is, the others are worth seeing
        while error.__cause__ is not None:
            error = error.__cause__
        return f"{shape.name}: {type(error).__name__}: {error}"


def compile_all(shapes: list[Configuration], processes: int) -> tuple[list[Row], list[str]]:
    """The rows of those that compile, and why others do not."""
    # Forked: what a process imports to compile, this one has imported.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=start) as pool:
        made = list(pool.map(attempt, shapes))
    return [row for row in made if isinstance(row, Row)], [row for row in made if isinstance(row, str)]


def differences(rows: list[Row], recorded: list[Row]) -> Iterator[str]:
    """Where the rows are worse than the recorded ones, or not the same configurations."""
    now, before = ({row.name: row for row in some} for some in (rows, recorded))
    yield from (f"{name}: in the table, and not compiled any more" for name in before.keys() - now.keys())
    for name, row in now.items():
        old = before.get(name)
        if old is None:
            yield f"{name}: not in the table"
            continue
        if row.tile != old.tile:
            yield f"{name}: tile {old.tile} in the table, {row.tile} now"
        if row.loops != old.loops or row.mma != old.mma:
            yield f"{name}: {old.loops} loops, {old.mma} mma in the table, {row.loops} loops, {row.mma} mma now"
        for count in COUNTS:
            was, has = getattr(old, count), getattr(row, count)
            if has > was:
                yield f"{name}: {count} {was} in the table, {has} now"


def improved(rows: list[Row], recorded: list[Row]) -> list[str]:
    before = {row.name: row for row in recorded}
    better = (r for r in rows if r.name in before and any(getattr(r, c) < getattr(before[r.name], c) for c in COUNTS))
    return [row.name for row in better]


def unexplained(rows: list[Row], explained: tuple[Explanation, ...] = EXPLAINED) -> Iterator[str]:
    """What no reason is given for: local loads and stores, products that are serialised or not found in a loop."""
    for row in rows:
        for place, count in row.places.items():
            if count and not any(e.covers(row, place) for e in explained):
                yield f"{row.name}: {count} local loads and stores ({place}), unexplained"
        if row.serialised:
            yield f"{row.name}: the assembler serialises the products"
        if row.mma and not row.loops:
            yield f"{row.name}: no main loop found in the machine code"


def read_table() -> tuple[str, list[Row]]:
    """The table and the version of triton that it belongs to."""
    found = json.loads(TABLE.read_text())
    return found["triton"], [Row(**row) for row in found["rows"]]


def write_table(rows: list[Row]) -> None:
    used = [
        e for e in EXPLAINED if any(count and e.covers(r, place) for r in rows for place, count in r.places.items())
    ]
    head = dict(target="sm_90", triton=triton.__version__, explained=[asdict(e) for e in used])
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)  # a line a row, for the eye and for diffs
    TABLE.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def check(rows: list[Row]) -> list[str]:
    version, recorded = read_table()
    if version != triton.__version__:
        return [f"the table is triton {version}'s, and this is triton {triton.__version__}"]
    for name in improved(rows, recorded):
        print(f"better than the table, which --write would renew: {name}")
    return list(differences(rows, recorded))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail where this is worse than the table")
    what.add_argument("--write", action="store_true", help="write the table")
    what.add_argument("--quick", action="store_true", help="float16 without the special cases")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()

    rows, faults = compile_all([s for s in shapes() if s.in_quick or not options.quick], options.processes)
    print(f"triton {triton.__version__}, sm_90")
    if rows:
        print(table([asdict(row) for row in rows]))
    if options.write and not faults:
        write_table(rows)
    if options.check:
        faults += check(rows)
    if options.check or options.write:
        faults += unexplained(rows)
    for fault in faults:
        print(f"not clean: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
