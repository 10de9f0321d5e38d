"""Fewer key heads: exact if heads were equal, saved and loaded like other models, and errors."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from distflash.integrations import transformers as dft
from tests.strategies import examples

SMALL = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=16,
    num_hidden_layers=2,
    head_dim=6,
    initializer_range=0.2,
    pad_token_id=0,
)
FAMILIES = {
    "llama": lambda **heads: LlamaConfig(**SMALL, **heads, attention_bias=True),
    "qwen2": lambda **heads: Qwen2Config(**SMALL, **heads),  # with biases of its own
    "qwen3": lambda **heads: Qwen3Config(**SMALL, **heads),
    "mistral": lambda **heads: MistralConfig(**SMALL, **heads, sliding_window=6),
    "gemma2": lambda **heads: Gemma2Config(**SMALL, **heads, sliding_window=6, attn_logit_softcapping=3.0),
    "olmo2": lambda **heads: Olmo2Config(**SMALL, **heads),
    "gpt_oss": lambda **heads: GptOssConfig(
        **SMALL, **heads, sliding_window=6, num_local_experts=2, num_experts_per_tok=2
    ),
    "phi3": lambda **heads: Phi3Config(**SMALL, **heads),
}
IDS = torch.randint(1, 48, (2, 17), generator=torch.Generator().manual_seed(1))


def build(family: str, heads: int, kv_heads: int, seed: int = 0):
    """With biases, gains and sinks that are random too."""
    torch.manual_seed(seed)
    config = FAMILIES[family](num_attention_heads=heads, num_key_value_heads=kv_heads)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def expand(model, family: str, kv_heads: int):
    """The same model with each key head repeated, so that there are `kv_heads`."""
    config = model.config
    heads, before, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def repeat(x):
        return x.view(before, size, -1).repeat_interleave(kv_heads // before, 0).reshape(kv_heads * size, *x.shape[1:])

    state = dict(model.state_dict())
    for name, x in state.items():
        *_, module, _ = ["", *name.split(".")]
        if module in ("k_proj", "v_proj") or (module == "k_norm" and family == "olmo2"):
            state[name] = repeat(x)
        elif module == "qkv_proj":
            q, k, v = x.split([heads * size, before * size, before * size])
            state[name] = torch.cat([q, repeat(k), repeat(v)])
    expanded = build(family, heads, kv_heads)
    expanded.load_state_dict(state)
    return expanded


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@examples(6)
@given(
    st.sampled_from([(4, 4, 2), (4, 4, 1), (4, 2, 1), (6, 6, 3), (6, 6, 2), (12, 6, 3), (12, 12, 4)]),
    st.sampled_from(["mean", "first"]),
    st.integers(0, 9),
)
def test_heads_that_were_equal_in_their_groups_make_the_same_model(family, counts, method, seed) -> None:
    heads, kv_heads, into = counts
    small = build(family, heads, into, seed)
    large = expand(small, family, kv_heads)
    torch.testing.assert_close(logits(large), logits(small), rtol=1e-5, atol=1e-5)  # the test's own expansion
    assert dft.group_key_heads(large, into, method=method) is large
    assert large.config.to_dict() == small.config.to_dict()
    assert all(torch.equal(x, large.state_dict()[name]) for name, x in small.state_dict().items())
    assert torch.equal(logits(large), logits(small))


@pytest.mark.parametrize("family", FAMILIES)
def test_is_saved_and_loaded_as_any_other(family, tmp_path) -> None:
    model = build(family, 6, 6)
    before = logits(model)
    dft.group_key_heads(model, 2)
    after = logits(model)
    assert not torch.allclose(before, after, rtol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert loaded.config.num_key_value_heads == 2
    assert torch.equal(logits(loaded), after)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_has_key_heads_changes_and_by_the_mean(family) -> None:
    model = build(family, 6, 6)
    old = copy.deepcopy(model.state_dict())
    new = dft.group_key_heads(model, 2).state_dict()
    changed = {name for name in old if old[name].shape != new[name].shape}
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - changed)
    modules = {"qkv_proj"} if family == "phi3" else {"k_proj", "v_proj", *["k_norm"] * (family == "olmo2")}
    assert {name.split(".")[-2] for name in changed} == modules
    assert len({name.split(".")[2] for name in changed}) == 2, "both layers"
    for name in changed:
        kept = 36 if family == "phi3" else 0  # rows of queries, before those of keys and values
        assert torch.equal(old[name][:kept], new[name][:kept])
        mean = old[name][kept:].double().view(-1, 3, 6, *old[name].shape[1:]).mean(1)
        torch.testing.assert_close(new[name][kept:].double().view_as(mean), mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_count_as_those_of_a_model_that_was_made_so(family) -> None:
    model, made = dft.group_key_heads(build(family, 6, 6), 3), dict(build(family, 6, 3).named_modules())
    for path, module in model.named_modules():
        counts = {name: x for name, x in vars(module).items() if type(x) is int}
        assert counts == {name: vars(made[path])[name] for name in counts}, path


def test_trains_and_keeps_dtype_mode_and_what_is_frozen() -> None:
    model = build("llama", 4, 4).to(torch.bfloat16).train()
    model.model.layers[0].requires_grad_(False)
    dft.group_key_heads(model, 2)
    assert model.training and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(input_ids=IDS, labels=IDS).loss.backward()
    frozen, trained = (layer.self_attn.k_proj for layer in model.model.layers)
    assert frozen.weight.grad is None and not frozen.weight.requires_grad
    assert trained.weight.grad.shape == (12, 24) and trained.bias.grad.shape == (12,)


def test_generates_with_a_cache_of_the_smaller_size() -> None:
    model = dft.group_key_heads(build("llama", 4, 4), 1)
    output = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert output.past_key_values.layers[0].keys.shape[1] == 1


# What is refused, with the model as it was ---------------------------------------------------------------------------


def config_of(kind, **options):
    """As small as the others; names that the config does not know are left out by the tests."""
    return AutoModelForCausalLM.from_config(kind(**options))


def latent():
    return config_of(
        DeepseekV3Config,
        **{name: x for name, x in SMALL.items() if name != "head_dim"},
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        first_k_dense_replace=2,
    )


def gpt2():
    return config_of(GPT2Config, vocab_size=48, n_embd=24, n_layer=1, n_head=4)


def falcon():
    return config_of(FalconConfig, vocab_size=48, hidden_size=24, num_hidden_layers=1, num_attention_heads=4)


def by_layer():
    """With another number of heads in the second layer, as some pruned models have it."""
    model = build("llama", 6, 6)
    model.config.per_layer_config = {1: {"num_key_value_heads": 3}}
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (by_layer, "the layers of this llama have numbers of heads of their own"),
        (latent, "deepseek_v3 makes the keys of all heads from one latent vector \\(kv_lora_rank=8\\)"),
        (gpt2, "the config of gpt2 has no num_key_value_heads"),
        (falcon, "the config of falcon has no num_key_value_heads"),
        (lambda: nn.Linear(2, 2), "expected a model of Transformers, got Linear"),
    ],
)
def test_models_without_a_grouped_form_are_refused(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        dft.group_key_heads(make(), 2)


@pytest.mark.parametrize(
    ("kv_heads", "words"),
    [
        (4, "4 does not divide the 6 query heads"),
        (6, "6 is not less than the 6 key heads"),
        (0, "expected an int of at least 1"),
        (2.0, "expected an int of at least 1, got 2.0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kv_heads, words) -> None:
    with pytest.raises(ValueError, match=words):
        dft.group_key_heads(build("llama", 6, 6), kv_heads)


def adapted(model) -> None:
    model.model.layers[1].self_attn.k_proj = nn.Sequential(model.model.layers[1].self_attn.k_proj)


def sharded(model) -> None:
    projection = model.model.layers[1].self_attn.v_proj
    projection.weight = nn.Parameter(projection.weight[:12].detach())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (adapted, "layers.1.self_attn.k_proj.*of either this model or the library's.*merge adapters"),
        (sharded, "layers.1.self_attn.v_proj.weight is \\[12, 24\\].*before the model is sharded"),
    ],
)
def test_what_is_not_the_librarys_model_is_refused_and_stays_as_it_was(harm, words) -> None:
    model = build("llama", 6, 6)
    harm(model)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        dft.group_key_heads(model, 2)
    assert [p.shape for p in model.parameters()] == shapes
    assert model.config.num_key_value_heads == 6 and model.model.layers[0].self_attn.num_key_value_groups == 1


def test_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match='expected "mean" or "first", got \'random\''):
        dft.group_key_heads(build("llama", 4, 4), 2, method="random")
