import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distflash.schedules import Ring, Trip
from distflash.transport import Simulator


@st.composite
def work_tables(draw):
    W = draw(st.integers(1, 8))
    row = st.lists(st.booleans(), min_size=W, max_size=W)
    return draw(st.lists(row, min_size=W, max_size=W))


def all_steps(work):
    """``[step][rank]``"""
    return list(zip(*(Ring().steps(work, rank) for rank in range(len(work))), strict=True))


@given(work_tables())
def test_every_owner_needed_is_worked_on_once_and_no_other(work):
    W = len(work)
    done = [(rank, step.owner) for steps in all_steps(work) for rank, step in enumerate(steps) if step.works]
    assert len(done) == len(set(done))
    assert set(done) == {(rank, owner) for rank in range(W) for owner in range(W) if work[rank][owner]}


@given(work_tables())
def test_what_arrives_was_held_by_its_sender_and_nothing_else_is_sent(work):
    W = len(work)
    first, *others = all_steps(work)
    assert all(step.owner == rank and step.source is None for rank, step in enumerate(first))
    assert not any(step.relays_to or step.gives_to for step in first)
    held = list(range(W))  # whose keys each rank holds, from the step before
    for steps in others:
        sent = [(rank, to, held[rank]) for rank, step in enumerate(steps) for to in step.relays_to]
        sent += [(rank, to, rank) for rank, step in enumerate(steps) for to in step.gives_to]
        expected = [(step.source, rank, step.owner) for rank, step in enumerate(steps) if step.works]
        assert sorted(sent) == sorted(expected)
        assert all(source != rank for source, rank, _ in sent)
        held = [step.owner if step.works else before for step, before in zip(steps, held, strict=True)]


@given(work_tables())
def test_gradients_go_home(work):
    for steps in all_steps(work):
        parts = [(rank, step.owner) for rank, step in enumerate(steps) if step.works and step.owner != rank]
        assert sorted(parts) == sorted((s.home_from, rank) for rank, s in enumerate(steps) if s.home_from is not None)


@given(work_tables())
def test_steps_that_nobody_needs_are_not_made(work):
    assert all(any(step.works for step in steps) for steps in all_steps(work)[1:])


@pytest.mark.parametrize("W", range(1, 9))
def test_a_dense_table_is_the_classical_ring(W):
    steps = all_steps([[True] * W] * W)
    assert len(steps) == W
    for ranks in steps[1:]:
        for rank, step in enumerate(ranks):
            assert step.source == (rank - 1) % W
            assert {*step.relays_to, *step.gives_to} == {(rank + 1) % W}


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("W", [1, 2, 3, 8])
def test_no_allocation_per_hop_after_the_first(W):
    """Every tensor that was ever held is kept alive here, so that new memory would have a new address."""
    lengths = [3 + rank % 2 for rank in range(W)]  # uneven, in the same buffers

    def work(transport):
        kv = tuple(torch.full((2, lengths[transport.rank], 1, d), float(transport.rank)) for d in (4, 5))
        trip = Trip(Ring().steps([[True] * W] * W, transport.rank), lengths, transport)
        kept, outgoing = [kv], []
        home = Ring().homecoming(trip, kv, torch.float64)
        for step, held in Ring().visit(trip, kv):
            assert all((t == step.owner).all() and t.shape[1] == lengths[step.owner] for t in held)
            kept.append(held)
            room = home.room(step)
            for part in room:
                part.fill_(10.0**transport.rank)
            outgoing.append(room)
            home.send(step)
        sums = home.finish()
        assert all(t.dtype == torch.float32 and (t == sum(10.0**r for r in range(W))).all() for t in sums)
        return [len(storages(tensors)) for tensors in (*zip(*kept, strict=True), *zip(*outgoing, strict=True))]

    own_and_received = 1 + min(2, W - 1)
    assert Simulator(W).run(work) == [[own_and_received] * 4] * W


def test_gradients_are_added_in_one_order():
    """The same bits in every run, whichever rank is quicker: parts are added in the order of the steps."""

    def work(transport):
        kv = (torch.zeros(1, 2, 1, 3),)
        trip = Trip(Ring().steps([[True] * 4] * 4, transport.rank), [2] * 4, transport)
        home = Ring().homecoming(trip, kv, torch.float32)
        for step, _ in Ring().visit(trip, kv):
            home.room(step)[0].fill_([1.0, 2.0**-24, 2.0**-24, -1.0][(transport.rank - step.owner) % 4])
            home.send(step)
        return home.finish()[0]

    # 1 + 2^-24 rounds to 1, twice; in another order something of it would be left.
    assert all((total == 0).all() for total in Simulator(4).run(work))


def test_keys_that_nobody_works_on_have_no_gradient():
    def work(transport):
        kv = (torch.ones(1, 2, 1, 3),)
        trip = Trip(Ring().steps([[False, False], [True, False]], transport.rank), [2, 2], transport)
        home = Ring().homecoming(trip, kv, torch.float32)
        for step, _ in Ring().visit(trip, kv):
            if step.works:
                home.room(step)[0].fill_(7.0)
            home.send(step)
        return home.finish()[0]

    of_rank_0, of_rank_1 = Simulator(2).run(work)
    assert (of_rank_0 == 7).all() and (of_rank_1 == 0).all()
