"""The tensors of an exchange in each stage of a plan: the right tokens, and no more buffers than are needed."""

import weakref

import pytest
import torch
from hypothesis import given

import distflash as df
from distflash.exchange import Exchange, take
from distflash.geometry import Geometry
from distflash.plan import Stage, Transfer, What
from distflash.transport import Simulator
from tests.strategies import geometries, schedules


def exchange_of(transport, plan, keys):
    exchange = Exchange(plan, transport, {What.KEYS: keys})
    exchange.tensors[What.KEYS, plan.rank] = keys
    return exchange


def by_position(positions):
    """K and V filled with each token's position: float32 ``[1, T, 2, 3]`` and ``[1, T, 2, 1]``."""
    tokens = positions.float()[None, :, None, None]
    return tokens.expand(1, -1, 2, 3).contiguous(), -tokens.expand(1, -1, 2, 1).contiguous()


@given(geometries(), schedules.filter(lambda schedule: schedule != df.PassQuery()))
def test_a_pass_finds_the_keys_of_its_sources(geometry, schedule):
    def work(transport):
        plan = schedule.plan(geometry, transport.rank)
        exchange = exchange_of(transport, plan, by_position(geometry.keys.positions(plan.rank)))
        for stage in exchange.walk(plan.forward, plan.done_with[0]):
            for each in stage.passes:
                for source, rows in zip(each.sources, each.visible, strict=True):
                    k, v = exchange.keys(source, rows.keys)
                    expected = rows.k_positions.float()[None, :, None, None]
                    assert (k == expected).all() and (v == -expected).all() and k.shape[1] == len(rows.keys)
        return list(exchange.tensors)

    left = Simulator(geometry.world_size).run(work)
    assert left == [[(What.KEYS, rank)] for rank in range(geometry.world_size)]


@pytest.mark.parametrize(
    ("schedule", "most"), [(df.Ring(), 2), (df.AllGather(7), 2), (df.AllGather(2), 7), (df.AllGather(1), 7)], ids=repr
)
def test_buffers_are_given_up_when_no_later_stage_needs_them(schedule, most):
    """On 8 ranks, besides local keys: those that are read, and those that arrive meanwhile."""
    geometry = Geometry.of_sequence(df.Full(), df.Contiguous(), 29, 8)  # of unequal lengths

    def work(transport):
        plan = schedule.plan(geometry, transport.rank)
        exchange = exchange_of(transport, plan, by_position(geometry.keys.positions(plan.rank)))
        buffers, alive = weakref.WeakSet(), []
        receive_buffers = exchange._receive_buffers

        def watched(transfer):
            tensors = receive_buffers(transfer)
            buffers.add(tensors[0])
            return tensors

        exchange._receive_buffers = watched
        for _ in exchange.walk(plan.forward, plan.done_with[0]):
            alive.append(len(buffers))
        return max(alive), len(buffers)

    assert Simulator(8).run(work) == [(most, 0)] * 8


def test_what_arrives_is_given_to_whoever_asks_for_it():
    """In the stage ``until``, and not before; by default it is stored in `Exchange.tensors`."""

    def work(transport):
        other = 1 - transport.rank
        stages = [
            Stage(
                tuple(
                    Transfer(sends, what, transport.rank if sends else other, other, 2, until)
                    for what, until in ((What.KEYS, 1), (What.QUERIES, 2))
                    for sends in (True, False)
                )
            ),
            Stage(),
            Stage(),
        ]
        mine = (torch.full((1, 2, 1, 1), float(transport.rank)),)
        geometry = Geometry.of_sequence(df.Full(), df.Contiguous(), 4, 2)
        exchange = exchange_of(transport, df.Ring().plan(geometry, transport.rank), mine)
        exchange.prototypes[What.QUERIES] = exchange.tensors[What.QUERIES, transport.rank] = mine
        asked = []
        exchange.on_arrival[What.QUERIES] = lambda transfer, tensors: asked.append(
            (transfer.of, float(tensors[0][0, 0]))
        )
        seen = []
        for _ in exchange.walk(stages, [frozenset()] * 3):
            seen.append(((What.KEYS, other) in exchange.tensors, list(asked)))
        return seen

    for rank, seen in enumerate(Simulator(2).run(work)):
        other = 1 - rank
        assert seen == [(False, []), (True, []), (True, [(other, float(other))])]


def test_tokens_that_lie_side_by_side_are_sent_as_they_are():
    x = torch.randn(1, 6, 2, 3)
    assert take(x, None) is x
    assert take(x, (range(2, 5),)).data_ptr() == x[:, 2].data_ptr()
    several = take(x, (range(1), range(4, 6)))
    assert several.is_contiguous() and torch.equal(several, x[:, [0, 4, 5]])
    batch = x.expand(2, -1, -1, -1).contiguous()
    assert take(batch, (range(2, 5),)).is_contiguous() and torch.equal(take(batch, (range(2, 5),)), batch[:, 2:5])
