"""Sums of gradients over passes and ranks, with a kernel that writes chosen numbers."""

from dataclasses import dataclass, field

import pytest
import torch

import distflash as df
from distflash.engine import keys_of
from distflash.exchange import Exchange
from distflash.geometry import Geometry
from distflash.gradients import GradientBuffers, Sum
from distflash.kernels.base import Abilities, BackwardContext, Kernel, Scores
from distflash.overlap import overlap
from distflash.plan import Gradients, Transfer, What
from distflash.transport import Alone, Simulator


@dataclass(frozen=True)
class Writes(Kernel):
    """Fills dK and dV with ``value(pass)``, and dQ with the number of passes that have added to it."""

    value: object
    calls: list = field(default_factory=list)

    def not_supported_reasons(self, problem):
        return []

    def forward(self, q, keys, each, scores, into):
        raise NotImplementedError

    def preprocess(self, q, out, lse, dout, dlse):
        return BackwardContext(q, dout, lse, lse)

    def backward(self, saved, keys, each, scores, dq, dkv):
        self.calls.append((each, dkv.dk.numel()))
        if each.gradients is not Gradients.OF_QUERIES:
            dkv.dk.fill_(self.value(each))
            dkv.dv.fill_(-self.value(each))
        if each.gradients is not Gradients.OF_KEYS:
            assert dq.sum is not None or (each.first and each.last), "there is a sum wherever there are two passes"
            total = torch.zeros_like(dq.final, dtype=torch.float32) if each.first else dq.sum
            total += 1
            (dq.final if each.last else dq.sum).copy_(total)


def gradients(transport, geometry, kernel, abilities=None, dtype=torch.float32):
    """dq, dk and dv of one rank, of one head of 2 and 3 dims."""
    plan = df.Ring().plan(geometry, transport.rank)
    plan = plan if abilities is None else overlap(plan, 1, 1, abilities, intra_node=True)
    T, K = geometry.queries.length(plan.rank), geometry.keys.length(plan.rank)
    q, out = torch.zeros(1, T, 1, 2, dtype=dtype), torch.zeros(1, T, 1, 3, dtype=dtype)
    keys = torch.zeros(1, K, 1, 2, dtype=dtype), torch.zeros(1, K, 1, 3, dtype=dtype)
    queries = q, out, torch.zeros(1, 1, T), out
    exchange = Exchange(plan, transport, {What.KEYS: keys, What.QUERIES: queries})
    exchange.tensors |= {(What.KEYS, plan.rank): keys, (What.QUERIES, plan.rank): queries}
    parts = GradientBuffers(exchange, kernel, Scores(1.0), rounds_keys=True)
    for stage in exchange.walk(plan.backward, plan.done_with[1]):
        for each in stage.passes:
            parts.compute(each, *keys_of(each, exchange))
    return parts.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_are_added_in_one_order(dtype):
    """The same bits in every run, whichever rank is quicker: the order is that of the steps."""
    geometry = Geometry.of_sequence(df.Full(), df.Contiguous(), 8, 4)

    def work(transport):
        by_step = [1.0, 2.0**-24, 2.0**-24, -1.0]
        kernel = Writes(lambda each: by_step[(transport.rank - each.sources[0]) % 4])
        return gradients(transport, geometry, kernel, dtype=dtype)

    # 1 + 2^-24 rounds to 1, twice; in another order something of it would be left.
    for _, dk, dv in Simulator(4).run(work):
        assert dk.dtype == dv.dtype == dtype and (dk == 0).all() and (dv == 0).all()


def test_gradients_of_keys_reach_their_owner_by_rows():
    """Of a window only some keys are seen by the next rank: only these have its part."""
    geometry = Geometry.of_sequence(df.Window(2, 0), df.Contiguous(), 12, 3)
    parts = Simulator(3).run(lambda t: gradients(t, geometry, Writes(lambda each: 10.0**t.rank)))
    expected = [[1, 1, 11, 11], [10, 10, 110, 110], [100] * 4]
    assert [dk[0, :, 0, 0].tolist() for _, dk, _ in parts] == expected
    assert [(-dv[0, :, 0, 0]).tolist() for _, _, dv in parts] == expected
    assert [dq.unique().tolist() for dq, _, _ in parts] == [[1], [2], [2]]


@dataclass(frozen=True)
class OnlyBefore(df.Mask):
    """Queries from ``cut`` on see the keys before it; nobody sees any other key."""

    cut: int

    def ends(self, positions, seq_len):
        return torch.zeros_like(positions), torch.where(positions >= self.cut, self.cut, 0)


def test_keys_that_nobody_works_on_have_no_gradient():
    """Nor have queries that see no key."""
    geometry = Geometry.of_sequence(OnlyBefore(4), df.Contiguous(), 8, 2)
    of_rank_0, of_rank_1 = Simulator(2).run(lambda t: gradients(t, geometry, Writes(lambda each: 7.0)))
    assert [x.unique().tolist() for x in of_rank_0] == [[0], [7], [-7]]
    assert [x.unique().tolist() for x in of_rank_1] == [[1], [0], [0]]


UNION = df.Causal() & (df.Window(3, 0) | df.FirstTokens(2))


@pytest.mark.parametrize("abilities", [Abilities(), Abilities(two_sources=True)], ids=["one source", "two sources"])
def test_a_part_of_a_mask_adds_to_the_keys_that_it_is_about(abilities):
    geometry = Geometry.of_sequence(UNION, df.Contiguous(), 12, 1)
    kernel = Writes(lambda each: 5.0 if each.adds else 1.0)
    dq, dk, dv = gradients(Alone(), geometry, kernel, abilities)
    assert dk[0, :, 0, 0].tolist() == (-dv[0, :, 0, 0]).tolist() == [6.0] * 2 + [1.0] * 10
    assert len(kernel.calls) == 2 and (dq == 2).all()


def test_dq_is_computed_while_dk_and_dv_travel():
    """They are not made room for again, and what travels is not written."""
    geometry = Geometry.of_sequence(df.Full(), df.Contiguous(), 8, 2)

    def work(transport):
        kernel = Writes(lambda each: 10.0**transport.rank)
        return gradients(transport, geometry, kernel, Abilities(separate_gradients=True)), kernel.calls

    for (dq, dk, dv), calls in Simulator(2).run(work):
        assert [(each.gradients, room) for each, room in calls] == [
            (Gradients.ALL, 8),
            (Gradients.OF_KEYS, 8),
            (Gradients.OF_QUERIES, 0),
        ]
        assert (dq == 2).all() and (dk == 11).all() and (dv == -11).all()


def part(count, rows=None):
    return Transfer(False, What.KEY_GRADIENTS, 0, 1, count, 1, rows)


@pytest.mark.parametrize("last_of_all", [True, False])
def test_a_sum_is_rounded_once(last_of_all):
    own, first = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 3, 4)
    last = torch.randn(2, 5 if last_of_all else 1, 3, 4)
    expected = own.clone()
    expected[:, [0, 1, 4]] += first
    expected[:, : last.shape[1]] += last
    total = Sum((own,), arrivals=2)
    total.add(part(3, (range(2), range(4, 5))), (first,))
    total.add(part(last.shape[1], (range(last.shape[1]),)), (last,))
    (result,) = total.finish(torch.bfloat16)
    assert torch.equal(result, expected.bfloat16())


def test_a_sum_without_parts_is_no_copy():
    own = torch.randn(1, 5, 3, 4)
    assert Sum((own,), arrivals=0).finish(torch.float32)[0] is own
