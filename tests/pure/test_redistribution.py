"""Halos and relayouts, and their gradients, which are those of the sum of all ranks' losses."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.transport import Simulator
from distflash.transport.simulated import SimulatedTransport
from tests.random_calls import Dealt
from tests.strategies import documents, layouts


def run(world_size, work, *layout):
    return Simulator(world_size).run(lambda transport: work(df.ContextParallel(transport, *layout)))


def uneven(seq_len, world_size):
    """Runs of random lengths, dealt to random ranks: some have several, some none."""
    cut = st.lists(st.integers(0, seq_len), max_size=5).map(lambda cuts: (*sorted(cuts), seq_len))
    owner = st.integers(0, world_size - 1)
    return cut.flatmap(lambda ends: st.builds(Dealt, st.just(ends), st.tuples(*[owner] * len(ends))))


@st.composite
def spread(draw):
    """A length, a number of ranks and two layouts."""
    seq_len, world_size = draw(st.integers(0, 24)), draw(st.integers(1, 8))
    one = layouts | uneven(seq_len, world_size)
    return seq_len, world_size, draw(one), draw(one)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(spread(), st.integers(-2, 1), st.booleans())
def test_gather_is_the_whole_and_its_gradient_the_sum(case, dim, knows_length):
    seq_len, world_size, layout, _ = case
    x = torch.randn([seq_len, 3] if dim % 2 == 0 else [3, seq_len], dtype=torch.float64)
    weights = torch.randn(world_size, *x.shape, dtype=torch.float64)

    def work(cp):
        mine = cp.shard(x, dim).requires_grad_()
        whole = cp.gather(mine, dim, seq_len if knows_length else None)
        assert torch.equal(whole, x)
        (whole * weights[cp.rank]).sum().backward()
        return mine.grad, cp.shard(weights.sum(0), dim)

    for got, expected in run(world_size, work, layout):
        close(got, expected)


@given(spread(), st.integers(-2, 1), st.booleans())
def test_relayout_and_its_gradient(case, dim, knows_length):
    seq_len, world_size, source, target = case
    known = seq_len if knows_length else None
    x = torch.randn([seq_len, 3] if dim % 2 == 0 else [3, seq_len], dtype=torch.float64)
    weights = torch.randn(x.shape, dtype=torch.float64)

    def work(cp):
        there = df.ContextParallel(cp.transport, target)
        mine = cp.shard(x, dim).requires_grad_()
        moved = cp.relayout(mine, dim, target, seq_len=known)
        assert torch.equal(moved, there.shard(x, dim))
        assert torch.equal(cp.relayout(moved, dim, source, source=target, seq_len=known), mine)
        (moved.pow(2) * there.shard(weights, dim)).sum().backward()
        return mine.grad, cp.shard(2 * x * weights, dim)

    for got, expected in run(world_size, work, source):
        close(got, expected)


def convolved(x, taps, docs):
    """Of one process, each document by itself, by the definition. ``x [B, S, C]``, ``taps [k, C]``."""
    ends = (0, x.shape[1]) if docs is None else docs.cu_seqlens
    lengths = [stop - start for start, stop in pairwise(ends)]
    padded = [F.pad(part, (0, 0, len(taps) - 1, 0)) for part in x.split(lengths, 1)]
    parts = [sum(tap * p[:, n : n + k] for n, tap in enumerate(taps)) for p, k in zip(padded, lengths, strict=True)]
    return torch.cat(parts, 1)


@given(st.data(), spread(), st.integers(0, 6), st.booleans(), st.booleans())
def test_a_convolution_of_a_halo_is_that_of_the_whole(data, case, left, packed, knows_length):
    seq_len, world_size, layout, _ = case
    docs = data.draw(documents(seq_len)) if packed and seq_len else None
    x = torch.randn(2, seq_len, 3, dtype=torch.float64)
    taps, weights = torch.randn(left + 1, 3, dtype=torch.float64), torch.randn(2, seq_len, 3, dtype=torch.float64)

    def work(cp):
        mine, own_taps = cp.shard(x).requires_grad_(), taps.clone().requires_grad_()
        rows, places = cp.halo(mine, left, documents=docs, seq_len=seq_len if knows_length else None)
        assert torch.equal(rows[:, places], mine)
        y = convolved(rows, own_taps, None)[:, places]
        (y * cp.shard(weights)).sum().backward()
        return cp.unshard(y), cp.unshard(mine.grad), own_taps.grad

    whole, whole_taps = x.clone().requires_grad_(), taps.clone().requires_grad_()
    y = convolved(whole, whole_taps, docs)
    (y * weights).sum().backward()
    results = run(world_size, work, layout)
    for got, gradient, _ in results:
        close(got, y)
        close(gradient, whole.grad)
    close(sum(of_taps for *_, of_taps in results), whole_taps.grad)


def test_second_derivatives():
    """Of the sum of all ranks' losses: each of fetch and return is the other's backward."""
    x = torch.rand(2, 7, dtype=torch.float64)

    def work(cp):
        mine = cp.shard(x).requires_grad_()
        rows, _ = cp.halo(mine, 2)
        moved = cp.relayout(mine, 1, df.Striped())
        (first,) = torch.autograd.grad(rows.pow(3).sum() + moved.pow(3).sum(), mine, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), mine)
        return cp.unshard(first.detach()), cp.unshard(second)

    whole = x.clone().requires_grad_()
    # In a zigzag over 2 ranks of 7 tokens the runs are 0, 1-2, 3-4 | 5-6 of ranks 0, 1, 1 and 0.
    counts = 1 + torch.tensor([1 + 1, 1 + 0, 1 + 0, 1 + 1, 1 + 1, 1, 1], dtype=torch.float64)
    (whole.pow(3) * counts).sum().backward()
    for first, second in run(2, work):
        close(first, 3 * x**2 * counts)
        close(second, 6 * x * counts)


@pytest.mark.parametrize(
    ("layout", "left", "rows"), [(df.Contiguous(), 3, 9), (df.Zigzag(), 3, 18), (df.Striped(), 5, 90)], ids=str
)
def test_only_what_is_needed_travels_and_once(layout, left, rows):
    """In stripes a row is needed before several tokens of a rank."""
    simulator = Simulator(4)
    simulator.run(lambda transport: df.ContextParallel(transport, layout).halo(torch.zeros(1, 8, 5), left))
    assert simulator.traffic.bytes == 4 * 5 * rows


@dataclass(frozen=True)
class Asking(SimulatedTransport):
    """Remembers what was asked of all ranks."""

    asked: list[list[int]] = field(default_factory=list)

    def gather_ints(self, values):
        self.asked.append(values)
        return super().gather_ints(values)


def test_ranks_that_know_the_length_ask_one_another_once():
    """As on GPUs, where a question waits for the device."""
    x = torch.zeros(1, 4, 5)

    def work(transport):
        asking = Asking(transport.simulator, transport.rank)
        cp = df.ContextParallel(asking, check_every_call=False)
        counts = []
        for docs in (None, df.Documents([0, 3, 8]), df.Documents([0, 5, 8])):
            for _ in range(2):
                cp.halo(x, 1, documents=docs, seq_len=8)
                cp.relayout(x, 1, df.Striped(), seq_len=8)
            counts.append(len(asking.asked))
        return counts

    # Of new documents the ranks agree once.
    assert Simulator(2).run(work) == [[2, 3, 4]] * 2


def test_tokens_that_stay_do_not_travel():
    simulator = Simulator(4)
    simulator.run(lambda transport: df.ContextParallel(transport).relayout(torch.zeros(1, 8, 5), 1, df.Zigzag()))
    assert simulator.traffic.bytes == 0


def test_the_gradient_of_a_gather_is_scattered():
    """Each rank is sent the gradients of its own tokens only, not all of the sum."""
    simulator = Simulator(4)

    def work(transport):
        x = torch.zeros(1, 8, 5, requires_grad=True)
        df.ContextParallel(transport).gather(x).sum().backward()

    simulator.run(work)
    assert simulator.traffic.bytes == 4 * 5 * 4 * 3 * 8


WRONG = [
    (lambda cp, x: cp.halo(x, -1), "left: expected a number of rows, an int of at least 0.* got -1"),
    (lambda cp, x: cp.halo(x, 1, 3), "dim: expected one of the 3 dimensions of x"),
    (lambda cp, x: cp.halo([1], 1), "x: expected a tensor, got list"),
    (lambda cp, x: cp.halo(x, 1, documents=[0, 8]), r"documents: expected df.Documents\(cu_seqlens\) or None"),
    (lambda cp, x: cp.relayout(x, 1, "zigzag"), "layout: expected a Layout such as df.Contiguous"),
    (lambda cp, x: cp.relayout(x, 1, df.Striped(), source=df.Zigzag), "source: expected a Layout"),
    (
        lambda cp, x: cp.gather(x, 1, 10),
        r"x: 4 tokens along dimension 1, but Zigzag\(\) gives rank 1 of 2 5 of seq_len=10",
    ),
    (lambda cp, x: cp.halo(x, 1, seq_len=10), r"x: 4 tokens along dimension 1, but Zigzag\(\) gives rank 1 of 2 5 of"),
    (lambda cp, x: cp.relayout(x, 1, df.Striped(), seq_len="8"), "seq_len: expected the global length"),
    (lambda cp, x: cp.gather(x, 1, -1), "seq_len: expected the global length, an int of at least 0.* got -1"),
    (lambda cp, x: cp.gather(x, 5), "dim: expected one of the 3 dimensions of x"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_wrong_arguments_of_one_rank_stop_all(call, words):
    def right(cp, x):
        return cp.halo(x, 1)

    def work(cp):
        with pytest.raises(ValueError, match=words if cp.rank else "rank 1 refused this call"):
            (call if cp.rank else right)(cp, torch.zeros(1, 4, 2))
        assert cp.halo(torch.zeros(1, 4, 2), 1)[0].shape[1] >= 4

    run(2, work)


def test_ranks_that_differ_are_told():
    def work(cp):
        with pytest.raises(ValueError, match="disagree about the halo: left is 1 on rank 0, 2 on rank 1"):
            cp.halo(torch.zeros(1, 4), 1 + cp.rank)
        with pytest.raises(ValueError, match=r"x: ranks hold \[4, 3\] along dimension 1, but Zigzag\(\) gives them"):
            cp.relayout(torch.zeros(1, 4 - cp.rank), 1, df.Striped())
        with pytest.raises(ValueError, match="documents: cu_seqlens end at 9, but the ranks hold 8 tokens"):
            cp.halo(torch.zeros(1, 4), 1, documents=df.Documents([0, 3, 9]))

    run(2, work)
