import gc
import threading
import traceback
import weakref

import pytest
import torch

from distflash.transport import Message, SimulationError, Simulator


def neighbours(transport):
    return (transport.rank + 1) % transport.world_size, (transport.rank - 1) % transport.world_size


@pytest.mark.parametrize("W", [2, 3, 64])
def test_a_ring_moves_tensors_and_counts_them(W):
    simulator = Simulator(W)

    def work(transport):
        to, source = neighbours(transport)
        arriving = torch.zeros(3)
        transport.exchange([Message(torch.full((3,), float(transport.rank)), to)], [Message(arriving, source)]).wait()
        return arriving

    results = simulator.run(work)
    assert [int(t[0]) for t in results] == [(rank - 1) % W for rank in range(W)]
    assert (simulator.traffic.messages, simulator.traffic.bytes) == (W, W * 12)
    assert sorted(simulator.traffic.pairs) == sorted((rank, (rank + 1) % W) for rank in range(W))


def test_messages_arrive_in_the_order_they_were_sent():
    def work(transport):
        if transport.rank == 0:
            for n in range(3):
                transport.exchange([Message(torch.tensor([n]), 1)], []).wait()
            return None
        rooms = [torch.empty(1, dtype=torch.int64) for _ in range(3)]
        transport.exchange([], [Message(room, 0) for room in rooms]).wait()
        return torch.cat(rooms).tolist()

    assert Simulator(2).run(work)[1] == [0, 1, 2]


def test_collectives_are_not_counted():
    simulator = Simulator(3)

    def work(transport):
        x = torch.full((transport.rank,), transport.rank)
        return transport.gather_ints([transport.rank]), transport.all_gather(x), transport.all_reduce(x.sum())

    for ints, gathered, total in simulator.run(work):
        assert ints == [[0], [1], [2]]
        assert [t.tolist() for t in gathered] == [[], [1], [2, 2]]
        assert total == 5
    assert simulator.traffic.messages == 0


def test_only_one_rank_runs_at_a_time():
    running, most = set(), []

    def work(transport):
        for _ in range(20):
            running.add(transport.rank)
            most.append(len(running))
            running.remove(transport.rank)
            transport.gather_ints([])

    Simulator(8).run(work)
    assert max(most) == 1


@pytest.mark.timeout(10)
def test_a_deadlock_is_reported():
    def work(transport):
        _, source = neighbours(transport)
        transport.exchange([], [Message(torch.empty(1), source)]).wait()

    with pytest.raises(
        SimulationError, match=r"deadlock: every running rank waits, rank \d for a message from rank \d"
    ):
        Simulator(3).run(work)


@pytest.mark.timeout(10)
def test_waiting_for_a_rank_that_has_ended_is_a_deadlock():
    def work(transport):
        if transport.rank == 0:
            transport.exchange([], [Message(torch.empty(1), 1)]).wait()

    with pytest.raises(SimulationError, match="rank 0 for a message from rank 1"):
        Simulator(2).run(work)


@pytest.mark.timeout(10)
def test_a_rank_that_fails_fails_the_run_by_name():
    def work(transport):
        if transport.rank == 2:
            raise KeyError("lost")
        transport.all_gather(torch.zeros(1))

    before = threading.active_count()
    with pytest.raises(KeyError, match="lost") as caught:
        Simulator(4).run(work)
    assert caught.value.__notes__ == ["raised by simulated rank 2 of 4"]
    assert threading.active_count() == before


def lose(tensor):
    raise KeyError("lost")


def test_an_error_has_its_traceback_and_nothing_outlives_it():
    kept = []

    def work(transport):
        tensor = torch.zeros(1)
        kept.append(weakref.ref(tensor))
        lose(tensor)

    simulator = Simulator(2)
    with pytest.raises(KeyError) as caught:
        simulator.run(work)
    assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][-2:] == ["work", "lose"]
    del caught
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def multithreaded():
    return torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_a_rank_runs_its_own_backward(before):
    """Autograd has one thread for each GPU: the first rank to wait for a message in it would stop all others."""
    with torch.autograd.set_multithreading_enabled(before):
        assert Simulator(3).run(lambda transport: multithreaded()) == [False] * 3
        assert multithreaded() == before


def test_ranks_know_their_device():
    assert Simulator(2).run(lambda transport: transport.device) == [torch.device("cpu")] * 2
    assert Simulator(2, "meta").run(lambda transport: transport.device) == [torch.device("meta")] * 2


def test_a_simulator_serves_again_after_a_failure():
    simulator = Simulator(2)

    def fail(transport):
        transport.exchange([Message(torch.zeros(1), 1 - transport.rank)], [])
        raise KeyError

    with pytest.raises(KeyError):
        simulator.run(fail)
    assert simulator.run(lambda transport: transport.gather_ints([transport.rank])) == [[[0], [1]]] * 2


@pytest.mark.timeout(10)
def test_changing_a_tensor_in_flight_is_detected():
    def work(transport):
        to, source = neighbours(transport)
        sent = torch.zeros(2)
        pending = transport.exchange([Message(sent, to)], [Message(torch.empty(2), source)])
        sent += 1
        pending.wait()

    with pytest.raises(SimulationError, match=r"rank \d changed a tensor while it was being sent"):
        Simulator(2).run(work)


def test_a_tensor_in_flight_may_hold_nan():
    def work(transport):
        peer, arriving = 1 - transport.rank, torch.empty(1)
        transport.exchange([Message(torch.tensor([torch.nan]), peer)], [Message(arriving, peer)]).wait()
        return arriving.isnan().item()

    assert Simulator(2).run(work) == [True, True]


def test_a_stride_that_nobody_uses_does_not_matter():
    """Two of one element, as a slice of a larger tensor has."""

    def work(transport):
        sent = torch.arange(8.0)[::2][transport.rank :][:1]
        assert sent.is_contiguous() and sent.stride() == (2,)
        arriving = torch.zeros(1)
        transport.exchange([Message(sent, 1 - transport.rank)], [Message(arriving, 1 - transport.rank)]).wait()
        return arriving.item()

    assert Simulator(2).run(work) == [2.0, 0.0]


def test_reading_before_wait_sees_nan():
    def work(transport):
        to, source = neighbours(transport)
        arriving = torch.zeros(2)
        pending = transport.exchange([Message(torch.ones(2), to)], [Message(arriving, source)])
        transport.gather_ints([])  # by now it has been sent, but nobody has waited
        early = arriving.clone()
        pending.wait()
        return early.isnan().all().item(), (arriving == 1).all().item()

    assert Simulator(2).run(work) == [(True, True)] * 2


@pytest.mark.timeout(10)
@pytest.mark.parametrize("room", [torch.empty(3), torch.empty(2, dtype=torch.float64)], ids=["shape", "dtype"])
def test_another_shape_or_dtype_than_expected_is_detected(room):
    def work(transport):
        if transport.rank == 0:
            transport.exchange([Message(torch.ones(2), 1)], []).wait()
        else:
            transport.exchange([], [Message(room, 0)]).wait()

    with pytest.raises(SimulationError, match=r"rank 1 expected .* from rank 0 and got torch.float32 \(2,\)"):
        Simulator(2).run(work)


@pytest.mark.parametrize("world_size", [0, -1, 1.5])
def test_a_simulator_has_ranks(world_size):
    with pytest.raises(ValueError, match="world_size"):
        Simulator(world_size)
