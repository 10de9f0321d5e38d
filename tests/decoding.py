"""What decoding kernels are checked against: dense attention over all keys, and stores of several ranks made by hand.

[Note: shapes] as in `distflash.kernels.decoding`; S positions in all, those of the new tokens included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import distflash as df
from distflash.cache_balance import storing_ranks
from distflash.kernels.base import Scores
from distflash.kernels.decoding import BEYOND, DIFFER, FULL, Decoding, Store, Table
from distflash.mask_algebra import Mask
from tests import oracle


@dataclass(frozen=True)
class Case:
    """Decoding steps of ``new`` tokens each, after ``lengths`` tokens of each sequence.

    Attributes:
        dropped: keys below this position are not stored; the mask must not allow them.
        unequal: how much more often a rank stores a key than the next rank.
        masks: one per sequence, in place of ``mask``.
    """

    name: str
    mask: Mask = field(default_factory=df.Causal)
    lengths: tuple[int, ...] = (37, 90)
    new: int = 1
    steps: int = 2
    heads: int = 4
    kv_heads: int = 2
    d_qk: int = 32
    d_v: int = 32
    dtype: torch.dtype = torch.float32
    world_size: int = 1
    room: int = 110
    scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropped: int = 0
    unequal: float = 1.0
    masks: tuple[Mask, ...] = ()

    @property
    def seq_len(self) -> int:
        return max(self.lengths) + self.new * self.steps

    @property
    def scores(self) -> Scores:
        slopes = 0.5 ** torch.arange(1, self.heads + 1, dtype=torch.float32) if self.alibi else None
        return Scores(self.d_qk**-0.5 if self.scale is None else self.scale, self.softcap, slopes)

    def mask_of(self, sequence: int) -> Mask:
        return self.masks[sequence] if self.masks else self.mask


HEAD_DIMS = [(16, 16), (40, 24), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)]


def of_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> Case:
    qk, v = dims
    return Case(f"head dims {qk}/{v}, {oracle._short(dtype)}", d_qk=qk, d_v=v, dtype=dtype, steps=1)


def cases() -> list[Case]:
    """All head dims in all dtypes, and every feature."""
    return [*(of_head_dims(dims, dtype) for dims in HEAD_DIMS for dtype in oracle.DTYPES), *features()]


def features() -> list[Case]:
    """Every feature, small enough for Triton's interpreter, on 1, 2, 3 and 8 ranks."""
    half, first = torch.bfloat16, df.FirstTokens(5)
    heads = [
        Case(f"{h} heads for {g}, {n} new", heads=h, kv_heads=g, new=n, dtype=dtype)
        for h, g, n, dtype in ((4, 4, 1, half), (8, 1, 1, half), (6, 2, 3, torch.float32), (40, 1, 5, half))
    ]
    kinds = [
        Case("causal, many parts", df.Causal() & (df.Window(7, 0) | first), new=3),
        Case("window", df.Window(20, 0), dropped=10, new=2),
        Case("window and first tokens", df.Causal() & (df.Window(9, 0) | first), dtype=half),
        Case("chunked", df.Causal() & df.Chunked(10), new=4),
        Case("prefix", df.PrefixLM(50), lengths=(51, 60), new=2),
        Case("full", df.Full(), new=3),
        Case("a mask of each sequence", masks=(df.Window(5, 0), df.Causal() & df.Chunked(8))),
        Case("rows that see nothing", oracle.Blind(38, 91), lengths=(38, 90), new=2),
        Case("rows that see nothing, with sinks", oracle.Blind(38, 91), lengths=(38, 90), new=2, sinks=True),
        Case("nothing yet", lengths=(0, 3), steps=3, new=2),
        Case("one sequence of many", lengths=(1, 64, 33, 65, 100)),
    ]
    options = [
        Case(f"{name}, {oracle._short(dtype)}", dtype=dtype, new=2, **changes)
        for name, changes in {
            "softcap": dict(softcap=5.0, scale=1.0),
            "alibi": dict(alibi=True),
            "sinks": dict(sinks=True),
            "negative scale": dict(scale=-0.2),
            "all at once": dict(softcap=5.0, alibi=True, sinks=True, mask=df.Causal() & (df.Window(30, 0) | first)),
        }.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    one = [*heads, *kinds, *options, Case("to the last slot", lengths=(90, 106), new=2, room=110)]
    return one + [
        replace(case, name=f"{case.name}, {W} ranks", world_size=W, room=60 if W < 8 else 30, unequal=unequal)
        for case, (W, unequal) in zip(
            [*heads, *kinds, *options], [(2, 1.0), (3, 1.5), (8, 1.0), (3, 1.0), (2, 1.3)] * 5, strict=False
        )
    ]


@dataclass(frozen=True)
class Inputs:
    """All keys of all sequences ``[B, S, ...]`` in global order, and queries at all positions."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    B, S, H, G = len(case.lengths), case.seq_len, case.heads, case.kv_heads
    sinks = normal(H, dtype=torch.float32) if case.sinks else None
    return Inputs(normal(B, S, H, case.d_qk), normal(B, S, G, case.d_qk), normal(B, S, G, case.d_v), sinks)


def make_stores(case: Case, x: Inputs) -> list[Store]:
    """Each rank's store. Unused memory is poisoned: NaN, and invalid positions."""
    B, W, C, device = len(case.lengths), case.world_size, case.room, x.k.device
    generator = torch.Generator().manual_seed(1)
    weights = case.unequal ** -torch.arange(W, dtype=torch.float64)
    owners = torch.multinomial(weights.expand(B, W), case.seq_len, replacement=True, generator=generator)
    kept = torch.arange(case.seq_len) < torch.tensor(case.lengths)[:, None]
    kept &= torch.arange(case.seq_len) >= case.dropped
    counts = torch.stack([(kept & (owners == rank)).sum(1) for rank in range(W)], 1).int()
    stores = []
    for rank in range(W):
        k, v = (torch.full((B, C, *y.shape[2:]), torch.nan, dtype=y.dtype, device=device) for y in (x.k, x.v))
        positions = torch.randint(-(2**31), 2**31 - 1, (B, C), generator=generator).int()
        for b in range(B):
            mine = (kept & (owners == rank))[b].nonzero()[:, 0]
            k[b, : len(mine)], v[b, : len(mine)] = x.k[b, mine.to(device)], x.v[b, mine.to(device)]
            positions[b, : len(mine)] = mine.int()
        numbers = (positions, counts, torch.tensor(case.lengths).int(), torch.zeros(1).int())
        stores.append(Store(k, v, *(y.to(device, copy=True) for y in numbers)))
    return stores


def make_table(case: Case, device: torch.device | str = "cpu") -> Table:
    """From a position before the first new token to one after the last."""
    start, stop = max(min(case.lengths) - 2, 0), case.seq_len + 3
    positions = torch.arange(start, stop)
    each = [mask.parts(positions, stop) for mask in case.masks or (case.mask,)]
    parts = max(map(len, each))
    ends = torch.zeros(len(each), 2, parts, stop - start, dtype=torch.int32)
    for n, of_mask in enumerate(each):
        for p, (lo, hi) in enumerate(of_mask):
            ends[n, 0, p], ends[n, 1, p] = lo, hi
    return Table(start, ends.to(device))


def on(scores: Scores, device: torch.device | str) -> Scores:
    slopes = scores.alibi_slopes
    return replace(scores, alibi_slopes=None if slopes is None else slopes.to(device))


def new_tokens(x: Tensor, lengths: Sequence[int], new: int) -> Tensor:
    """``[B, new, ...]``: those from each sequence's length on."""
    return torch.stack([of_sequence[length : length + new] for of_sequence, length in zip(x, lengths, strict=True)])


def step(
    decoding: Decoding, case: Case, x: Inputs, stores: list[Store], table: Table, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """One step on all ranks, which must have the same bits."""
    q, k, v = (new_tokens(y, lengths, case.new) for y in (x.q, x.k, x.v))
    scores = on(case.scores, q.device)
    if case.world_size == 1:
        return decoding.alone(q, k, v, stores[0], table, scores, x.sinks)
    messages = torch.stack([decoding.attend(q, k, v, store, table, scores, r) for r, store in enumerate(stores)])
    assert not messages[..., :-4].isnan().any()
    results = [decoding.merge(messages, q, store, x.sinks) for store in stores]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True)), "ranks differ"
    return results[0]


def run(decoding: Decoding, case: Case, x: Inputs, stores: list[Store]) -> tuple[Tensor, Tensor]:
    """All steps: out ``[steps * B, n, H, V]``, lse ``[steps * B, n, H]``."""
    table, lengths, found = make_table(case, x.q.device), list(case.lengths), []
    for _ in range(case.steps):
        counts = stores[0].counts.clone()
        found.append(step(decoding, case, x, stores, table, lengths))
        check_stores(case, x, stores, counts, lengths)
        lengths = [length + case.new for length in lengths]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses)


def check_stores(case: Case, x: Inputs, stores: list[Store], before: Tensor, lengths: Sequence[int]) -> None:
    """Check which rank stores each new key, its index, and that all ranks know it."""
    whose = storing_ranks(before, case.new)
    after = before + torch.nn.functional.one_hot(whose, case.world_size).sum(1).int()
    for rank, store in enumerate(stores):
        assert torch.equal(store.counts, after)
        assert store.lengths.tolist() == [length + case.new for length in lengths]
        assert store.fault.item() == 0
        for b, length in enumerate(lengths):
            mine = length + (whose[b] == rank).nonzero()[:, 0]
            slots = slice(int(before[b, rank]), int(after[b, rank]))
            assert torch.equal(store.positions[b, slots].long(), mine)
            assert torch.equal(store.k[b, slots], x.k[b, mine])
            assert torch.equal(store.v[b, slots], x.v[b, mine])


def dense(case: Case, x: Inputs, compute: torch.dtype, stored: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The expected result of `run`, by `oracle.dense` on each sequence."""
    found, device = [], x.q.device
    for n in range(case.steps):
        for b, length in enumerate(case.lengths):
            since, until = length + n * case.new, length + (n + 1) * case.new
            mine = torch.arange(since, until)
            visible = case.mask_of(b).materialize(mine, torch.arange(until), case.seq_len + 3)
            q, k, v = x.q[b, None, since:until], x.k[b, None, :until], x.v[b, None, :until]
            scores = replace(on(case.scores, device), sinks=x.sinks)
            nothing = torch.zeros_like(q[..., :1].expand(*q.shape[:3], case.d_v))
            inputs = oracle.Inputs(q, k, v, nothing, None, scores, visible.to(device), mine.to(device))
            results = oracle.dense(inputs, compute, stored)
            found.append((results["out"], results["lse"].transpose(1, 2)))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses)


def check(decoding: Decoding, case: Case, device: torch.device | str = "cpu") -> None:
    """Assert that all steps are as exact as dense attention with the same roundings."""
    x = make_inputs(case, device)
    out, lse = run(decoding, case, x, make_stores(case, x))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    truth, plain = dense(case, x, torch.float64), dense(case, x, wide, stored=case.dtype)
    unseen = truth[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen)
    assert (out[unseen] == 0).all()
    oracle.assert_as_exact("out", out, plain[0], truth[0], case.dtype)
    oracle.assert_as_exact("lse", lse[~unseen], plain[1][~unseen], truth[1][~unseen], wide)
    if case.dtype.itemsize == 2:
        once = truth[0].to(case.dtype).double()
        assert (out - truth[0]).norm() <= 1.01 * (once - truth[0]).norm(), "rounded more than once"


FAULTS = {"queries": DIFFER, "counts": DIFFER, "lengths": DIFFER, "full": FULL, "before": BEYOND, "behind": BEYOND}


def check_fault(decoding: Decoding, fault: str, world_size: int, device: torch.device | str = "cpu") -> None:
    """Assert that an impossible step gives NaN, sets the fault, and leaves the cache unchanged until it is reset."""
    case = Case("fault", lengths=(9, 14), new=2, steps=1, d_qk=16, d_v=16, room=40, world_size=world_size)
    x = make_inputs(case, device)
    stores, table = make_stores(case, x), make_table(case, device)
    before = [[getattr(store, name).clone() for name in ("k", "v", "counts", "lengths")] for store in stores]
    q, k, v = (new_tokens(y, case.lengths, case.new) for y in (x.q, x.k, x.v))
    queries, bad = [q.clone() for _ in stores], stores[-1]
    if fault == "queries":
        queries[-1][1, 1, 2, 3] *= -1
    elif fault == "counts":
        bad.counts[0, 0] -= 1
    elif fault == "lengths":
        bad.lengths[1] += 1
    elif fault == "full":
        for store in stores:
            store.counts[1] = case.room
            store.counts[1, -1] -= case.new - 1
    else:
        table = Table(table.start + 3, table.ends) if fault == "before" else Table(table.start, table.ends[..., :8])
    wrong = [[getattr(store, name).clone() for name in ("counts", "lengths")] for store in stores]

    def give(queries: list[Tensor], table: Table) -> list[tuple[Tensor, Tensor]]:
        if world_size == 1:
            return [decoding.alone(queries[0], k, v, stores[0], table, case.scores, None)]
        each = zip(queries, stores, strict=True)
        messages = torch.stack([decoding.attend(q, k, v, s, table, case.scores, r) for r, (q, s) in enumerate(each)])
        return [decoding.merge(messages, q, store, None) for q, store in zip(queries, stores, strict=True)]

    for made in (give(queries, table), give([q] * world_size, make_table(case, device))):
        for (out, lse), store, numbers in zip(made, stores, wrong, strict=True):
            assert out.isnan().all() and lse.isnan().all()
            assert store.fault.item() == FAULTS[fault]
            assert torch.equal(store.counts, numbers[0]) and torch.equal(store.lengths, numbers[1])
    for rank, (store, (keys, values, counts, lengths)) in enumerate(zip(stores, before, strict=True)):
        for b, count in enumerate(counts[:, rank].tolist()):
            assert torch.equal(store.k[b, :count], keys[b, :count])
            assert torch.equal(store.v[b, :count], values[b, :count])
        store.fault.zero_()
        store.counts.copy_(counts)
        store.lengths.copy_(lengths)
    for out, lse in give([q] * world_size, make_table(case, device)):
        assert out.isfinite().all() and lse.isfinite().all()
    check_stores(case, x, stores, before[0][2], case.lengths)
