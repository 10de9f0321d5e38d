"""Profiler ranges of a call, and their order."""

import pytest
import torch

import distflash as df
from distflash.transport import Simulator

pytestmark = pytest.mark.pure


def ranges(call, warm=True):
    """The names of the ranges of ``call()``, without "distflash::", in the order in which they begin."""
    if warm:
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = [each for each in profile.events() if each.name.startswith("distflash::")]
    events.sort(key=lambda each: each.time_range.start)
    return [each.name.removeprefix("distflash::") for each in events]


def on_two_ranks(work):
    """``work(cp)`` on both of two ranks, of which rank 0 is profiled: its ranges."""

    def of_rank(transport):
        cp = df.ContextParallel(transport, check_every_call=True)
        call = work(cp)
        if cp.rank:
            call(), call()
            return None
        return ranges(call)

    return Simulator(2).run(of_rank)[0]


def test_forward_and_backward_of_a_ring_are_ranges_in_order():
    def work(cp):
        def call():
            q, k, v = (torch.randn(1, 8, heads, 16, requires_grad=True) for heads in (4, 2, 2))
            df.attention(q, k, v, mask=df.Causal(), cp=cp).sum().backward()

        return call

    found = on_two_ranks(work)
    keys, gradients = "sends and receives: the keys of step 1", "sends and receives: the gradients of step 1"
    assert found == [
        "attention",
        "agreement",
        f"start of {keys}",
        "forward step 0, keys of rank 0, key heads 0 to 0",
        f"wait for {keys}",
        "forward step 1, keys of ranks 0, 1",
        "attention_backward",
        "agreement",
        f"start of {keys}",
        "backward preprocess",
        "backward step 0, keys of rank 0, key heads 0 to 0",
        f"wait for {keys}",
        "backward step 1, keys of rank 1",
        f"start of {gradients}",
        "backward step 2, keys of rank 0, key heads 1 to 1",
        f"wait for {gradients}",
    ]


def test_ulysses_and_steps_of_decoding_are_ranges():
    def placements(cp):
        ulysses = df.ContextParallel(cp.transport, schedule=df.Ulysses())
        q, k, v = (torch.randn(1, 8, heads, 16) for heads in (4, 2, 2))
        return lambda: df.attention(q, k, v, cp=ulysses)

    def decoding(cp):
        cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=16, capacity=8, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, heads, 16, generator=generator) for heads in (4, 2, 2))
        return lambda: df.decode(q, k, v, cache=cache)

    found = on_two_ranks(placements)
    assert [name for name in found if name.startswith("placement")] == ["placement inward", "placement outward"]
    assert on_two_ranks(decoding)[1:] == [
        "decode, keys of this rank",
        "decode, gather of partial states",
        "decode, merge of partial states",
    ]


def test_ranged_calls_have_the_same_bits():
    q, k, v = (torch.randn(1, 8, heads, 16) for heads in (4, 2, 2))
    plain = df.attention(q, k, v, mask=df.Causal())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        profiled = df.attention(q, k, v, mask=df.Causal())
    assert torch.equal(plain, profiled)


def test_without_a_profiler_no_range_is_made(monkeypatch):
    def never(*_):
        raise AssertionError("a range without a profiler")

    monkeypatch.setattr("distflash.profiling.record_function", never)
    monkeypatch.setattr("distflash.engine.with_profiler_ranges", never)
    df.attention(*torch.randn(3, 1, 8, 4, 16), mask=df.Causal())
