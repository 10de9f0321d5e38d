"""Activation checkpointing that keeps attention: its forward runs once, and results are unchanged."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distflash as df
from distflash.recipes.config import ModelConfig
from distflash.recipes.model import Decoder, loss_sum
from distflash.transport import Alone, Simulator
from tests.counting import Counting

LAYERS, S = 3, 21
KEPT = dict(checkpoint_activations=True)
ALL = dict(checkpoint_activations=True, recompute_attention=True)


def step(options, transport, seq_len=S, mask=None, **precision):
    """Forward and backward of a decoder: the loss, the gradients, how often attention's kernel ran forward."""
    kernel = Counting()
    cp = df.ContextParallel(transport, kernel=kernel)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(LAYERS, dim=16, heads=2, kv_heads=1, ffn=32, **options), cp)
    tokens = torch.randint(0, 256, (2, seq_len + 1))
    positions = cp.positions(seq_len)
    with torch.autocast("cpu", enabled=bool(precision), **precision):
        logits = model(tokens[:, positions], seq_len, mask)
    loss = loss_sum(logits, tokens[:, positions + 1])
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], kernel.forwards


def assert_same(got, expected):
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, df.Causal() & df.Documents([0, 4, S])], ids=["causal", "documents"])
@pytest.mark.parametrize("precision", [{}, {"dtype": torch.bfloat16}], ids=["float32", "autocast"])
def test_attention_runs_once_per_layer_and_gradients_are_the_same_bits(precision, mask):
    plain, kept, recomputed = (step(options, Alone(), mask=mask, **precision) for options in ({}, KEPT, ALL))
    assert [forwards for *_, forwards in (plain, kept, recomputed)] == [LAYERS, LAYERS, 2 * LAYERS]
    assert_same(kept, plain)
    assert_same(recomputed, plain)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_ring_sends_nothing_twice(world_size):
    def traffic_and_steps(options):
        simulator = Simulator(world_size)
        return simulator.run(lambda transport: step(options, transport)), simulator.traffic

    (plain, sent), (kept, sent_kept), (_, sent_again) = map(traffic_and_steps, ({}, KEPT, ALL))
    assert (sent_kept.messages, sent_kept.bytes) == (sent.messages, sent.bytes)
    assert sent_again.messages > sent.messages
    for mine, expected in zip(kept, plain, strict=True):
        assert_same(mine, expected)
        assert mine[2] == expected[2]


def attend_twice(q, k, v, cp):
    """Two attentions, of one of which the lse is used as well."""
    out, lse = df.attention(q, k, v, mask=df.Causal(), cp=cp, return_lse=True)
    return df.attention(out * lse.mT[..., None], k, v, cp=cp).square().sum()


OWN_POLICY = partial(create_selective_checkpoint_contexts, df.checkpoint_policy)


@pytest.mark.parametrize("context_fn", [df.keep_attention, OWN_POLICY], ids=["ours", "policy"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_every_attention_and_its_lse_are_kept(compiled, context_fn):
    kernel = Counting()
    cp = df.ContextParallel(Alone(), kernel=kernel)

    def checkpointed(*qkv):
        return checkpoint(attend_twice, *qkv, cp, use_reentrant=False, context_fn=context_fn)

    torch._dynamo.reset()
    function = torch.compile(checkpointed, fullgraph=True, backend="aot_eager") if compiled else checkpointed
    qkv = [t.requires_grad_() for t in torch.randn(3, 1, S, 2, 8, dtype=torch.float64)]
    got = torch.autograd.grad(function(*qkv), qkv)
    assert kernel.forwards == 2
    torch.testing.assert_close(got, torch.autograd.grad(attend_twice(*qkv, cp), qkv), rtol=0, atol=0)


def keeping(function):
    """``function`` of q, k and v, checkpointed; q, k and v; and how often attention's forward has run."""
    kernel = Counting()
    cp = df.ContextParallel(Alone(), kernel=kernel)
    qkv = [t.requires_grad_() for t in torch.randn(3, 1, S, 2, 8)]
    loss = checkpoint(function, *qkv, cp, use_reentrant=False, context_fn=df.keep_attention).sum()
    return loss, qkv, kernel


def test_another_number_of_operations_in_backward_is_nothing_to_it():
    """As where weights are gathered in forward, and are still there in backward."""
    passes = []

    def gathering(q, k, v, cp):
        passes.append(q.detach() * 2 if not passes else None)
        return df.attention(q, k, v, cp=cp).square()

    loss, qkv, kernel = keeping(gathering)
    loss.backward()
    assert len(passes) == 2 and kernel.forwards == 1
    torch.testing.assert_close(qkv[0].grad, torch.autograd.grad(gathering(*qkv, None).sum(), qkv[0])[0], rtol=0, atol=0)


def more_in_backward(q, k, v, cp):
    q.calls = getattr(q, "calls", 0) + 1
    with torch.no_grad():
        for _ in range(1, q.calls):
            df.attention(q, k, v, cp=cp)
    return df.attention(q, k, v, cp=cp).sin()


@pytest.mark.parametrize(
    "function",
    [more_in_backward, lambda q, k, v, cp: df.attention(q, k, v, cp=cp).mul_(2).sin()],
    ids=["more", "written"],
)
def test_what_cannot_be_returned_is_an_error(function):
    loss, _, _ = keeping(function)
    with pytest.raises(RuntimeError, match=r"distflash\.attention.* not found|has been mutated"):
        loss.backward()
