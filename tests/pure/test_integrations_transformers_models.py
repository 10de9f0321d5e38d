"""Models that need more than attention over ranks: errors before or after their forward."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen2MoeConfig

import distflash as df
from distflash.integrations import transformers as tf
from distflash.integrations.transformers.masks import LayerMask
from distflash.integrations.transformers.models import attendance_problem, output_problem
from distflash.integrations.transformers.rope import rope_problem
from distflash.transport import Alone
from tests.tiny_models import SMALL, Case, relative
from tools.families import Family

S = 12
IDS = torch.arange(3, 3 + S)[None]


@pytest.fixture
def cp():
    """One rank, registered."""
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    yield cp
    tf.unregister()


def raises(words):
    return pytest.raises(ValueError, match=words)


# By what a model is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "class_name", "words"),
    [
        ("roberta", "RobertaForMaskedLM", "RobertaModel counts positions from padding_idx \\+ 1"),
        ("xlm-roberta", "XLMRobertaModel", "XLMRobertaModel counts positions from padding_idx|has a pooler"),
        ("camembert", "CamembertForCausalLM", "counts positions from padding_idx"),
        ("longformer", "LongformerForMaskedLM", "attention of LongformerForMaskedLM does not go through the library's"),
        ("deberta-v2", "DebertaV2ForMaskedLM", "attention of DebertaV2ForMaskedLM does not go through the library's"),
        ("gptj", "GPTJForCausalLM", "attention of GPTJForCausalLM does not go through the library's registry"),
        ("gpt_neo", "GPTNeoForCausalLM", "attention of GPTNeoForCausalLM does not go through"),
        ("bloom", "BloomForCausalLM", "attention of BloomForCausalLM does not go through"),
        ("codegen", "CodeGenForCausalLM", "attention of CodeGenForCausalLM does not go through"),
        ("mpt", "MptForCausalLM", "attention of Mpt|takes no position_ids|computes on the attention mask itself"),
        ("xglm", "XGLMForCausalLM", "attention of XGLMForCausalLM does not go through"),
        ("falcon", "FalconForCausalLM", "attention of FalconForCausalLM does not go through"),
        (
            "bart",
            "BartForCausalLM",
            "BartDecoder.forward takes no position_ids: it would count this rank's tokens from",
        ),
        ("bart", "BartForConditionalGeneration", "BartForConditionalGeneration is an encoder-decoder"),
        ("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration is an encoder-decoder"),
        ("mamba2", "Mamba2ForCausalLM", "layers of type linear_attention"),
        ("jamba", "JambaForCausalLM", "layers of type linear_attention"),
        ("qwen3_next", "Qwen3NextForCausalLM", "layers of type linear_attention"),
        ("llama", "LlamaForSequenceClassification", "makes one result of a sequence, from the last or first of this"),
        ("bert", "BertForSequenceClassification", "makes one result of a sequence"),
        ("bert", "BertModel", "BertModel has a pooler.*add_pooling_layer=False"),
        ("mobilebert", "MobileBertForMaskedLM", "adds the neighbours of a token to it"),
        ("doge", "DogeForCausalLM", "a layer of this model computes on the attention mask itself"),
        ("stablelm", "StableLmForCausalLM", "this model's layers do not pass keywords on to their attention"),
    ],
)
def test_models_that_are_refused_with_or_without_labels(model_type, class_name, words, cp):
    model = Family(model_type, class_name, "causal").model("distflash")
    for batch in ({"input_ids": IDS}, {"input_ids": IDS, "labels": IDS}):
        with raises(words):
            model(**tf.shard_batch(batch, cp))


def test_the_default_qwen2_moe_asks_for_a_window_that_no_layer_uses(cp):
    config = Qwen2MoeConfig(
        **SMALL, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    outputs = []
    for attention, batch in (("eager", {"input_ids": IDS}), ("distflash", tf.shard_batch({"input_ids": IDS}, cp))):
        torch.manual_seed(0)
        outputs.append(AutoModelForCausalLM.from_config(config, attn_implementation=attention)(**batch).logits)
    assert relative(*outputs) <= 1e-5


def test_a_mask_is_not_read_but_by_distflash():
    for mask, words in (
        (LayerMask(df.Causal()), "computes on the attention mask itself"),
        (LayerMask(problem="because"), "because"),
    ):
        for read in (
            lambda mask: mask[:, :, :3],
            lambda mask: mask.to(torch.float32),
            lambda mask: torch.zeros(3) + mask,
            lambda mask: torch.where(mask, 0, 1),
        ):
            with raises(words):
                read(mask)
        assert copy.deepcopy(mask) == mask


def test_the_hooks_go_with_unregister(cp):
    assert torch_module._has_any_global_hook()
    tf.unregister()
    assert not torch_module._has_any_global_hook()


def test_generate_is_refused_as_such(cp):
    model = Case("llama").model("distflash")
    with raises(r"generate: goes through no other cache than a ShardedCache.*past_key_values=cache"):
        model.generate(input_ids=IDS, max_new_tokens=2)


# By what it has done -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_has_not_attended_is_refused_without_labels(attention, cp):
    for model in (Case("llama").model(attention), Case("llama").model(attention).model):
        with raises(f"no layer of the model has used distflash.*has '{attention}': give the model"):
            model(**tf.shard_batch({"input_ids": IDS}, cp))


def test_a_second_model_has_to_attend_itself(cp):
    part = tf.shard_batch({"input_ids": IDS}, cp)
    Case("llama").model("distflash")(**part)
    with raises("no layer of the model has used distflash"):
        Case("llama").model("eager")(**part)


class OwnAttention(LlamaModel):
    """Has layers, one of which is of another kind, as in hybrids that do not say so in their configuration."""

    def __init__(self, config):
        super().__init__(config)
        self.layers[1] = Averaging()


class Averaging(nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states.mean(1, keepdim=True) + hidden_states


def test_a_model_some_of_whose_layers_have_not_attended_is_refused(cp):
    model = OwnAttention._from_config(LlamaConfig(**SMALL), attn_implementation="distflash")
    with raises("model: has layers of Averaging beside those that attend"):
        model(**tf.shard_batch({"input_ids": IDS}, cp))


def test_attendance_is_that_of_the_kind_not_of_every_layer():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))  # of which one layer was skipped, as by LayerDrop
    assert attendance_problem(model, {model.model.layers[0].self_attn}) is None
    assert "no layer of the model has used distflash" in attendance_problem(model, set())


def test_results_that_are_not_one_a_token_are_refused(cp):
    shard = tf.shard_batch({"input_ids": IDS}, cp)["distflash"]
    model = Case("llama").model("eager")
    fits, pooled = torch.zeros(1, S, 5), torch.zeros(1, 5)
    assert output_problem(model, {"logits": fits, "loss": torch.zeros(())}, shard) is None
    assert output_problem(model, (fits,), shard) is None
    for name in ("logits", "pooler_output"):
        assert output_problem(model, {name: pooled}, shard).startswith(f"{name}: LlamaForCausalLM makes [1, 5] of 12")
    with raises("logits: LlamaForCausalLM makes .1, 2, 48. of 12 tokens"):
        Case("llama").model("distflash")(**tf.shard_batch({"input_ids": IDS}, cp), logits_to_keep=2)


# RoPE ----------------------------------------------------------------------------------------------------------------


def rope(**parameters):
    config = LlamaConfig(**SMALL, max_position_embeddings=20)
    config.rope_parameters = parameters
    return config


def part(seq_len, layout=None, world_size=2, documents=None):
    return tf.Shard(layout or df.Zigzag(), world_size, 0, seq_len, documents)


@pytest.mark.parametrize(
    ("seq_len", "layout", "ok"),
    [
        (20, df.Zigzag(), True),
        (21, df.Zigzag(), False),
        (26, df.Zigzag(), False),
        (28, df.Zigzag(), True),  # ranks' last tokens are numbers 28 and 21
        (40, df.Contiguous(), False),
        (21, df.Striped(), False),
        (22, df.Striped(), True),
    ],
)
def test_longrope_is_refused_where_ranks_are_on_both_sides_of_its_limit(seq_len, layout, ok):
    for config in (
        rope(rope_type="longrope", original_max_position_embeddings=20),
        rope(full_attention={"rope_type": "longrope", "original_max_position_embeddings": 20}),
    ):
        problem = rope_problem(config, part(seq_len, layout))
        assert (problem is None) == ok
        if not ok:
            assert "rope_type: 'longrope' has other frequencies up to 20 tokens" in problem


def test_dynamic_rope_is_refused_beyond_its_limit():
    config = rope(rope_type="dynamic", factor=2.0)
    assert rope_problem(config, part(20)) is None
    assert rope_problem(config, part(40, documents=df.Documents([0, 20, 40]))) is None
    assert rope_problem(config, part(40, world_size=1)) is None
    assert "rope_type: 'dynamic' computes its frequencies from the length" in rope_problem(config, part(21))
    assert rope_problem(rope(rope_type="default"), part(40)) is None
    assert rope_problem(None, part(40)) is None
