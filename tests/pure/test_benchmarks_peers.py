"""The ring of `benchmarks.peers.zigzag` is right, with a dense kernel."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import distflash as df
from benchmarks.common import Shape
from benchmarks.comparison import reference_for
from benchmarks.peers import local, rings, zigzag
from benchmarks.workloads import MASKS
from distflash.transport import Message, Simulator

SHAPE = Shape(2, 96, 4, 2, 16, 16)
LAYOUT = df.Zigzag()


class Dense:
    """The definition, with flash-attn-4's conventions."""

    merge = staticmethod(zigzag.merge)

    def scores(self, q, k, causal):
        s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * q.shape[-1] ** -0.5
        return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf) if causal else s

    def forward(self, q, k, v, causal):
        s = self.scores(q, k, causal)
        out = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v.repeat_interleave(q.shape[2] // v.shape[2], 2))
        return out, s.logsumexp(-1)

    def backward(self, dout, q, k, v, out, lse, causal):
        assert lse.is_contiguous()
        group = q.shape[2] // k.shape[2]
        p = torch.exp(self.scores(q, k, causal) - lse[..., None])
        dp = torch.einsum("bihd,bjhd->bhij", dout, v.repeat_interleave(group, 2))
        ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None]) * q.shape[-1] ** -0.5
        dq = torch.einsum("bhij,bjhd->bihd", ds, k.repeat_interleave(group, 2))
        dk, dv = (torch.einsum("bhij,bihd->bjhd", x, y) for x, y in ((ds, q), (p, dout)))
        return (dq, *(x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv)))


def rank_inputs(rank, world_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    length = SHAPE.S // world_size
    heads = (SHAPE.H, SHAPE.G, SHAPE.G, SHAPE.H)
    return tuple(torch.randn(SHAPE.B, length, h, SHAPE.D, generator=generator, dtype=dtype) for h in heads)


@pytest.mark.parametrize("W", [1, 2, 3, 4])
def test_the_zigzag_ring_is_exact(W):
    def work(transport):
        cp = df.ContextParallel(transport, layout=LAYOUT)
        q, k, v, dout = rank_inputs(transport.rank, W)
        out, lse = zigzag.forward(q, k, v, transport, Dense())
        dq, dk, dv = zigzag.backward(dout, q, k, v, out, lse, transport, Dense())
        right = reference_for((q, k, v, dout), df.Causal(), cp, SHAPE.S)
        return right.errors(out=out, dq=dq, dk=dk, dv=dv)

    for errors in Simulator(W).run(work):
        assert max(errors.values()) < 5e-6, errors


def test_two_ranks_round_once_and_more_ranks_add_in_float32():
    """With 16-bit inputs: what is kept between hops."""

    def work(transport):
        q, k, v, dout = rank_inputs(transport.rank, transport.world_size, torch.bfloat16)
        kept = []

        class Spy(Dense):
            def merge(self, out, lse, part, part_lse):
                kept.append(out.dtype)
                zigzag.merge(out, lse, part, part_lse)

        out, lse = zigzag.forward(q, k, v, transport, Spy())
        grads = zigzag.backward(dout, q, k, v, out, lse.bfloat16(), transport, Dense())
        return set(kept), {x.dtype for x in (out, *grads)}

    assert Simulator(2).run(work) == [({torch.bfloat16}, {torch.bfloat16})] * 2
    assert Simulator(3).run(work) == [({torch.float32}, {torch.bfloat16})] * 3


def test_a_kernel_that_refuses_leaves_nothing_in_flight():
    class Refusing(Dense):
        def forward(self, q, k, v, causal):
            raise NotImplementedError("no such head dim")

    def work(transport):
        q, k, v, _ = rank_inputs(transport.rank, transport.world_size)
        with pytest.raises(NotImplementedError):
            zigzag.forward(q, k, v, transport, Refusing())
        # A message that nobody has taken would be taken for this one.
        arriving, (to, source) = torch.empty(1), ((transport.rank + n) % transport.world_size for n in (1, -1))
        sent = Message(torch.full((1,), float(transport.rank)), to)
        transport.exchange([sent], [Message(arriving, source)]).wait()
        return arriving.item() == source

    assert all(Simulator(3).run(work))


def test_the_zigzag_ring_is_differentiable_and_takes_causal_masks_only():
    candidate = zigzag.ring(df.transport.Alone(), Dense())
    inputs = rank_inputs(0, 1)
    right = reference_for(inputs, df.Causal(), df.ContextParallel(df.transport.Alone()), SHAPE.S)
    assert max(right.errors(**candidate.run(inputs, df.Causal()).results).values()) < 5e-6
    with pytest.raises(ValueError, match="takes Causal masks only"):
        candidate.run(inputs, df.Full())


@pytest.mark.parametrize("name", MASKS)
def test_flex_attention_gets_the_same_mask(name):
    S, mask = 96, MASKS[name](96)
    n = torch.arange(S)
    allowed = create_mask(local.flex_mask(mask, S, torch.device("cpu")), 1, 1, S, S, device="cpu")
    assert torch.equal(allowed[0, 0], mask.materialize(n, n, S))


def test_sdpa_refuses_masks_that_it_would_drop():
    sdpa = local.MAKERS[local.FLASH]()
    with pytest.raises(ValueError, match="takes Full and Causal masks only"):
        sdpa.run(rank_inputs(0, 1), df.Window(3, 0))


def test_sdpa_is_right_where_it_runs():
    """On a CPU the flash backend takes no grouped heads unless they are repeated."""
    inputs = rank_inputs(0, 1)
    cp = df.ContextParallel(df.transport.Alone())
    for mask in (df.Full(), df.Causal()):
        passes = rings.repeated(local.MAKERS[local.FLASH]()).run(inputs, mask)
        assert max(reference_for(inputs, mask, cp, SHAPE.S).errors(**passes.results).values()) < 5e-6
