"""Simulated ranks that share a GPU."""

import pytest
import torch

import distflash as df
from distflash.transport import Message, SimulationError, Simulator
from tests.dense import Problem, assert_no_less_exact, join, make_inputs, on_rank, on_ranks
from tests.gpu import problems

pytestmark = pytest.mark.gpu


def test_messages_travel_and_what_has_not_arrived_is_nan():
    def work(transport):
        peer = 1 - transport.rank
        arriving = torch.zeros(2, device=transport.device)
        pending = transport.exchange([Message(torch.ones(2, device=transport.device), peer)], [Message(arriving, peer)])
        early = arriving.clone()
        pending.wait()
        return transport.device.type, early.isnan().all().item(), (arriving == 1).all().item()

    assert Simulator(2, "cuda").run(work) == [("cuda", True, True)] * 2


@pytest.mark.timeout(60)
def test_changing_a_tensor_in_flight_is_detected():
    def work(transport):
        sent = torch.zeros(2, device=transport.device)
        pending = transport.exchange(
            [Message(sent, 1 - transport.rank)], [Message(torch.empty_like(sent), 1 - transport.rank)]
        )
        sent += 1
        pending.wait()

    with pytest.raises(SimulationError, match="changed a tensor while it was being sent"):
        Simulator(2, "cuda").run(work)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=lambda d: f"made for {d}")
def test_every_rank_runs_its_own_backward(device):
    """Also where nobody has said which device the tensors are on."""
    p = Problem(seq_len=61, heads=4, kv_heads=2, dtype=torch.float32)
    x = make_inputs(p)
    on_gpu, kernel = problems.on(x, "cuda"), df.kernels.Reference()
    parts = Simulator(3, device).run(
        lambda transport: problems.to_cpu(on_rank(p, on_gpu, df.ContextParallel(transport, kernel=kernel)))
    )
    assert_no_less_exact(p, x, join(parts, df.Zigzag(), p.seq_len), on_ranks(p, x, 1, df.Zigzag()))
