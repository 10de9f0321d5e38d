"""Several groups on the same ranks, with different layouts."""

import pytest
import torch

import distflash as df
from distflash.transport import Simulator

LAYOUTS = (df.Zigzag(), df.Striped(), df.Contiguous())


def test_a_group_in_other_layouts_attends_exactly():
    q, k, v = torch.randn(3, 1, 13, 2, 8, dtype=torch.float64)
    exact = df.attention(q, k, v, mask=df.Causal())

    def work(transport):
        first = df.ContextParallel(transport, LAYOUTS[0])
        groups = [first, *(first.with_layout(layout) for layout in LAYOUTS[1:])]
        for cp in (*groups, *groups):  # in turns: neither takes the other's plans
            out = df.attention(*(cp.shard(x) for x in (q, k, v)), mask=df.Causal(), cp=cp, seq_len=13)
            torch.testing.assert_close(cp.unshard(out), exact, rtol=1e-12, atol=1e-12)
        return [cp.layout for cp in groups], first.agreement.calls

    for layouts, calls in Simulator(3).run(work):
        assert layouts == list(LAYOUTS)
        assert calls == 6  # numbered together


def test_the_layout_is_an_object():
    with pytest.raises(ValueError, match="layout: expected"):
        df.ContextParallel(df.transport.Alone()).with_layout("zigzag")
