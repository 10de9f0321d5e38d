"""The router loss over all ranks' tokens equals that of the whole batch, with its gradient."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, AutoModelForCausalLM, JetMoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import distflash as df
from distflash.integrations import transformers as tf
from distflash.integrations.transformers.router_loss import router_loss_problem
from distflash.transport import Alone, Simulator
from tests.strategies import examples, layouts
from tests.tiny_models import SMALL, Case

E, TOP, LAYERS = 5, 2, 3


def logits_of(seq_len, seed):
    generator = torch.Generator().manual_seed(seed)
    # Some experts are much more popular than others, and more so at the end of the sequence.
    slope = torch.linspace(0, 3, seq_len)[:, None] * torch.arange(E)
    return [torch.randn(2, seq_len, E, generator=generator) + slope for _ in range(LAYERS)]


@examples(20)
@given(layouts, st.integers(1, 30), st.integers(1, 5), st.booleans(), st.sampled_from(["sum", "mean"]))
def test_it_is_the_librarys_of_the_whole_batch(layout, seq_len, world_size, padded, reduction):
    whole = [x.requires_grad_() for x in logits_of(seq_len, seed=seq_len)]
    mask = (torch.arange(2 * seq_len).view(2, -1) % 5 != 1).long() if padded else None
    expected = load_balancing_loss_func(tuple(x.flatten(0, 1) for x in whole), E, TOP, mask)
    expected.backward()

    def work(transport):
        cp = df.ContextParallel(transport, layout)
        parts = [cp.shard(x.detach()).requires_grad_() for x in whole]
        own_mask = None if mask is None else cp.shard(mask)
        loss = tf.router_aux_loss([x.flatten(0, 1) for x in parts], E, TOP, cp, own_mask, reduction=reduction)
        loss.backward()
        factor = world_size if reduction == "mean" else 1
        return loss.detach(), [cp.unshard(x.grad) / factor for x in parts]

    for loss, gradients in Simulator(world_size).run(work):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        for got, x in zip(gradients, whole, strict=True):
            torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-7)


def test_the_mean_of_the_ranks_own_losses_is_another_number():
    parts = [tuple(x[:, n : n + 8].flatten(0, 1) for x in logits_of(16, seed=0)) for n in (0, 8)]
    whole = load_balancing_loss_func(tuple(x.flatten(0, 1) for x in logits_of(16, seed=0)), E, TOP)
    assert abs(sum(load_balancing_loss_func(part, E, TOP) for part in parts) / 2 - whole) > 0.01 * whole


WRONG = [
    ({"top_k": 6}, "num_experts, top_k: expected numbers of experts, top_k at most all, got 5, 6"),
    ({"router_logits": ()}, r"router_logits: expected a tensor \[tokens, 5\] for each layer with a router"),
    ({"router_logits": [torch.zeros(4, 3)]}, r"as in output.router_logits .* got \[a tensor \[4, 3\]\]"),
    ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: expected one number for each of this rank's \[4\] tokens"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words[:20] for _, words in WRONG])
def test_wrong_arguments_of_one_rank_stop_all(change, words):
    def work(transport):
        cp = df.ContextParallel(transport)
        right = {"router_logits": [torch.zeros(4, E)], "num_experts": E, "top_k": TOP, "cp": cp}
        with pytest.raises(ValueError, match=words if cp.rank else "rank 1 refused this call"):
            tf.router_aux_loss(**(right | change if cp.rank else right))

    Simulator(2).run(work)


@pytest.fixture
def cp():
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    yield cp
    tf.unregister()


def test_a_tuple_in_which_the_loss_is_not_found_is_refused(cp):
    part = tf.shard_batch(Case("mixtral").inputs(), cp)
    with pytest.raises(ValueError, match="return_dict: MixtralForCausalLM returns a tuple"):
        Case("mixtral").model("distflash")(**part, output_router_logits=True, return_dict=False)


def test_an_output_without_router_logits_is_refused():
    output = SimpleNamespace(loss=torch.zeros(()), aux_loss=torch.zeros(()))
    problem = router_loss_problem(Case("mixtral").model("eager"), output, None)
    assert "has no router_logits" in problem and problem.endswith("set router_aux_loss_coef=0.0")


def test_a_loss_that_is_not_known_is_refused(cp):
    sizes = {name: size for name, size in SMALL.items() if name not in ("num_attention_heads", "head_dim")}
    config = JetMoeConfig(**sizes, kv_channels=8, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="distflash")
    part = tf.shard_batch(Case("mixtral").inputs(), cp)
    with pytest.raises(
        ValueError, match="output_router_logits: JetMoeForCausalLM computes its routers' auxiliary loss"
    ):
        model(**part, output_router_logits=True)
    model(**part)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_a_compiled_model_has_the_loss_of_all_tokens_too(family, monkeypatch):
    """The hook alone, with a loss of this rank's tokens that is wrong: compiling a whole model takes long."""
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    try:
        model, part = Case(family).model("distflash"), tf.shard_batch(Case(family).inputs(), cp)
        asked = {"output_router_logits": family == "mixtral"}
        output = model(**part, **({"output_router_logits": True} if family == "mixtral" else {}))
        output["aux_loss"] = torch.zeros(())
        hooks = AttentionInterface._global_mapping[tf.NAME].hooks
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        changed = hooks._after(model, (), {**part, **asked}, output)
        assert (changed is None) == (family == "llama")
        assert changed is None or changed.aux_loss > 0
    finally:
        tf.unregister()
