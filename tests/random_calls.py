"""Random calls of `df.attention`: what `tests/fuzz.py` tries.

A case follows from its seed and its number alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import torch

import distflash as df
from distflash.kernels import Kernel
from distflash.kernels.base import Abilities
from distflash.schedules import Schedule
from tests.dense import Problem
from tests.oracle import Blind
from tests.strided import STRIDES

TENSORS = ("q", "k", "v", "dout", "dlse")
PER_HEAD = ("sinks", "slopes")


@dataclass(frozen=True)
class Case:
    """One call on some ranks.

    Attributes:
        strides: of each tensor, a name of `STRIDES`.
        views: whether q, k and v are views of tensors that require a gradient.
        gradients: which of q, k, v and sinks require one.
        uses: which of out and lse the loss depends on.
        says_seq_len: whether ``seq_len`` is passed.
        mesh: the shape of a two-dimensional mesh, if any.
    """

    problem: Problem
    ranks: int
    layout: df.Layout
    schedule: Schedule
    kernel: Kernel | None
    strides: dict[str, str]
    views: bool
    gradients: tuple[str, ...]
    uses: tuple[str, ...]
    says_seq_len: bool
    mesh: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dealt(df.Layout):
    """A layout of runs of any lengths, ``[ends[n - 1], ends[n])`` for rank ``owners[n]``."""

    ends: tuple[int, ...]
    owners: tuple[int, ...]

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        runs = zip((0, *self.ends), self.ends, self.owners, strict=False)
        return tuple(range(start, end) for start, end, owner in runs if owner == rank)


@dataclass(frozen=True)
class HeldBack(df.kernels.Hopper):
    """The Hopper kernel with deferred heads for any number of keys."""

    def abilities(self, device: torch.device) -> Abilities:
        return replace(super().abilities(device), smallest_work=0)


@dataclass(frozen=True)
class Build:
    """What a GPU kernel is compiled for: a few of them, each for many calls."""

    kernel: Kernel
    d_qk: int
    d_v: int
    dtype: torch.dtype
    group: int
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False


SCORES = 2e7  # of all heads, which the dense computation holds several times
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
BUILDS = (
    *(Build(HeldBack(), *dims, torch.bfloat16, 1) for dims in DIMS),
    *(Build(HeldBack(), *dims, torch.float16, 2, softcap=4.0, sinks=True) for dims in DIMS),
    Build(HeldBack(), 64, 64, torch.bfloat16, 4, sinks=True),
    Build(HeldBack(), 128, 128, torch.bfloat16, 4, softcap=9.0),
    *(Build(df.kernels.Triton(), *dims, torch.bfloat16, 2) for dims in DIMS),
    *(Build(df.kernels.Triton(), *dims, torch.float16, 1, softcap=4.0, sinks=True, alibi=True) for dims in DIMS),
    Build(df.kernels.Triton(), 64, 64, torch.float32, 4, sinks=True),
    Build(df.kernels.Triton(), 128, 128, torch.float32, 1, alibi=True),
    Build(df.kernels.Reference(), 64, 64, torch.float32, 2, softcap=4.0, sinks=True, alibi=True),
)


def draw(seed: int, number: int, *, ranks: int | None = None, interpreter: bool = False) -> Case:
    """Case ``number`` of ``seed`` for CPUs: any kernel that runs there.

    Args:
        ranks: how many; None for 1 to 16.
        interpreter: whether some cases are for Triton's interpreter, which must be on.
    """
    random = Random(f"cpu {seed} {number}")
    in_interpreter = interpreter and random.random() < 0.02
    if in_interpreter:
        kernel: Kernel | None = df.kernels.Triton(interpret=True)
        shape = _shape(random, kv_heads=2, groups=2, longest=40, dims=(16, 24, 40))
        dtype = random.choice((torch.float32, torch.bfloat16, torch.float16))
        ranks = ranks or random.choice((1, 2, 3, 3, 4))
    else:
        kernel = _kernel(random)
        shape = _shape(random, kv_heads=8, groups=4, longest=100, dims=(1, 2, 5, 8, 12, 16))
        dtype = random.choice((*[torch.float64] * 4, torch.float32, torch.bfloat16, torch.float16))
        ranks = ranks or random.choice((1, 2, 2, 3, 3, 4, random.randint(5, 8), random.randint(9, 16)))
    options = dict(
        softcap=random.choice((0.0, 0.0, 2.0, random.uniform(0.5, 30.0))),
        sinks=random.random() < 0.3,
        alibi=random.random() < 0.3,
        dropout_p=random.choice((0.0, 0.0, 0.3)) if dtype == torch.float64 else 0.0,
        dropout_seed=random.randrange(-(2**63), 2**63),
    )
    return _case(random, kernel, ranks, dtype, shape, options)


def draw_for_gpu(seed: int, number: int) -> Case:
    """Case ``number`` of ``seed`` for a Hopper GPU: a kernel of `BUILDS` in turn."""
    random = Random(f"cuda {seed} {number}")
    build = BUILDS[number % len(BUILDS)]
    shape = _shape(random, kv_heads=8, groups=1, longest=1, dims=(64,))
    # Numbers of heads for which launches would be compiled anew: 1, and multiples of 16.
    heads = random.choice([g for g in range(1, 9) if g * build.group not in (1, 16, 32)])
    longest = int((SCORES / (max(1, shape["batch"]) * heads * build.group)) ** 0.5)
    shape |= dict(kv_heads=heads, heads=heads * build.group, d_qk=build.d_qk, d_v=build.d_v)
    shape["seq_len"] = min(random.randint(0, random.choice((4, 40, 300, 1500, 1500))), longest)
    ranks = random.choice((1, 2, 2, 3, 3, 4, random.randint(5, 8), random.randint(9, 16)))
    options = dict(softcap=build.softcap, sinks=build.sinks, alibi=build.alibi)
    case = _case(random, build.kernel, ranks, build.dtype, shape, options)
    # At an address of another alignment launches are compiled anew.
    return replace(case, strides=case.strides | dict.fromkeys(PER_HEAD, "plain"))


def _kernel(random: Random) -> Kernel | None:
    sizes = (3, 5, 8, 16, 17, 64, 128)
    block_q, block_k = random.choice(sizes), random.choice(sizes)
    return None if random.random() < 0.05 else df.kernels.Reference(block_q, block_k)


def _shape(random: Random, kv_heads: int, groups: int, longest: int, dims: tuple[int, ...]) -> dict[str, Any]:
    heads = random.randint(1, kv_heads)
    few, some = random.randint(0, 4), random.randint(0, 20)
    return dict(
        seq_len=random.choice((few, few, some, some, random.randint(0, longest), random.randint(0, longest))),
        batch=random.choice((*(1, 2, 3) * 16, 0)),
        kv_heads=heads,
        heads=heads * random.randint(1, groups),
        d_qk=random.choice(dims),
        d_v=random.choice(dims),
    )


def _case(
    random: Random,
    kernel: Kernel | None,
    ranks: int,
    dtype: torch.dtype,
    shape: dict[str, Any],
    options: dict[str, Any],
) -> Case:
    seq_len = shape["seq_len"]
    mask, layout = _mask(random, seq_len), _layout(random, seq_len, ranks)
    scale = random.choice((None, None, 1.0, -0.3, random.uniform(-2.0, 2.0) or None))
    equal = len({layout.length(seq_len, ranks, rank) for rank in range(ranks)}) == 1
    wanted = [name for name in ("q", "k", "v", "sinks") if random.random() < 0.85]
    uses = random.choice((("out",), ("out",), ("out", "lse"), ("out", "lse"), ("lse",), ()))
    odd = random.random() < 0.6
    case = Case(
        problem=Problem(mask=mask, dtype=dtype, scale=scale, seed=random.randrange(10**6), **shape, **options),
        ranks=ranks,
        layout=layout,
        schedule=_schedule(random, ranks),
        kernel=kernel,
        strides={name: _strides(random, name, dtype) if odd else "plain" for name in (*TENSORS, *PER_HEAD)},
        views=random.random() < 0.5,
        gradients=tuple(name for name in wanted if name != "sinks" or options["sinks"]) if uses else (),
        uses=uses,
        says_seq_len=not (equal or mask.seq_len is not None) or random.random() < 0.5,
    )
    # Last, so that the other cases are what they were before there were these.
    case = _of_rows(random, case) if random.random() < 0.2 else case
    case = _of_chunk(random, case) if random.random() < 0.3 else case
    return _by_ulysses(random, case) if random.random() < 0.25 else case


def _by_ulysses(random: Random, case: Case) -> Case:
    """`Ulysses` over as many ranks as divide the heads, with another inner schedule."""
    divisors = [n for n in range(1, case.ranks + 1) if case.ranks % n == 0 and case.problem.heads % n == 0]
    degree, dim = random.choice(divisors[-2:]), random.choice((0, 1))
    groups = case.ranks // degree
    inner = _schedule(random, groups)
    return replace(case, schedule=df.Ulysses(inner, dim), mesh=(degree, groups) if dim == 0 else (groups, degree))


def _of_rows(random: Random, case: Case) -> Case:
    """With a mask for each sequence."""
    p = case.problem
    mask: df.Mask = df.Rows([_mask(random, p.seq_len) for _ in range(p.batch)])
    if random.random() < 0.4:
        other = _simple_mask(random, p.seq_len)
        mask = random.choice((mask & other, mask | other, other & mask, other | mask))
    knows = mask.seq_len is not None or p.mask.seq_len is None
    return replace(case, problem=replace(p, mask=mask), says_seq_len=case.says_seq_len or not knows)


def _of_chunk(random: Random, case: Case) -> Case:
    """With queries that are other tokens than the keys, in a layout of their own."""
    p = case.problem
    start = random.randint(0, p.seq_len)
    count = random.choice((0, 1, random.randint(0, p.seq_len - start), p.seq_len - start))
    mask = p.mask
    if random.random() < 0.2:
        mask, start, count = df.Full(), random.randint(0, 2 * p.seq_len), random.randint(0, p.seq_len + 3)
    count = min(count, p.seq_len - start) if mask is p.mask else count
    says = case.says_seq_len or mask.seq_len is not p.mask.seq_len
    problem = replace(p, mask=mask, q_start=start, q_len=count, kv_layout=case.layout)
    return replace(case, problem=problem, layout=_layout(random, count, case.ranks), says_seq_len=says)


def _schedule(random: Random, ranks: int) -> Schedule:
    nodes = random.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
    kinds = (df.Ring(), df.AllGather(random.randint(1, 4)), df.DoubleRing(nodes), df.PassQuery())
    return random.choice((*kinds, df.Ring(), df.PassQuery()))


def _strides(random: Random, name: str, dtype: torch.dtype) -> str:
    if name in PER_HEAD:
        return random.choice(("plain", "every second", "shifted", "expanded dims", "negated"))
    return random.choice(("plain", *STRIDES))


def _layout(random: Random, seq_len: int, ranks: int) -> df.Layout:
    runs = random.randint(1, 2 * ranks)
    ends = sorted(random.randint(0, seq_len) for _ in range(runs - 1))
    dealt = Dealt((*ends, seq_len), tuple(random.randrange(ranks) for _ in range(runs)))
    return random.choice((df.Contiguous(), df.Zigzag(), df.Striped(), dealt))


def _mask(random: Random, seq_len: int) -> df.Mask:
    mask = _simple_mask(random, seq_len)
    while random.random() < 0.4:
        other = _simple_mask(random, seq_len)
        mask = mask & other if random.random() < 0.5 else mask | other
    return mask


def _simple_mask(random: Random, seq_len: int) -> df.Mask:
    a, b = (random.randint(0, random.choice((3, seq_len + 2))) for _ in range(2))
    masks = [
        df.Full(),
        df.Causal(),
        df.Window(a, b),
        df.Window(a, 0),
        df.PrefixLM(a),
        df.Chunked(a + 1),
        Blind(min(a, b), max(a, b)),
        df.FirstTokens(a),
        df.BlockCausal(a + 1),
        df.ImageBlocks([min(a, b)], [abs(a - b)]),
    ]
    if seq_len:
        cuts = sorted({0, seq_len, *(random.randint(1, seq_len) for _ in range(random.randint(0, 6)))})
        lengths = [stop - start for start, stop in pairwise(cuts)]
        masks += [df.Documents(cuts)] * 2
        masks += [df.Tree([random.randint(-1, n - 1) for n in range(len(lengths))], lengths)] * 2
    return random.choice(masks)


def describe(case: Case) -> dict[str, str]:
    """The labels by which the summary counts cases."""
    name: Any = type(case.kernel).__name__ if case.kernel is not None else "best"
    return {
        "kernel": "Hopper" if isinstance(case.kernel, HeldBack) else name,
        "layout": type(case.layout).__name__,
        "schedule": type(case.schedule).__name__,
        "ranks": str(case.ranks),
        "calls": "chunk" if case.problem.q_len is not None else "self-attention",
        "masks": "for each row" if isinstance(case.problem.mask, df.Rows) else "for all",
        "dtype": str(case.problem.dtype).removeprefix("torch."),
    }
