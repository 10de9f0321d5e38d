"""Without processes: shards of batches, models on one rank, and all errors."""

import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DataCollatorWithFlattening,
    DynamicCache,
    GptOssPreTrainedModel,
    LlamaConfig,
    masking_utils,
    modeling_flash_attention_utils,
)

import distflash as df
from distflash.integrations import transformers as tf
from distflash.integrations.transformers.batch import require_same_batch
from distflash.transport import Alone, Simulator
from tests.counting import Counting
from tests.tiny_models import CONFIGS, SMALL, Case, eager, enable_checkpointing, relative, results

S = 11


@pytest.fixture
def cp():
    """One rank, registered."""
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    yield cp
    tf.unregister()


def state_of_the_library():
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        list(GptOssPreTrainedModel._compatible_flash_implementations),
        modeling_flash_attention_utils._loaded_implementation,
    )


# Switching on and off ------------------------------------------------------------------------------------------------


def test_importing_changes_nothing_and_unregister_takes_back_all_that_register_did():
    before = state_of_the_library()
    assert "distflash" not in AttentionInterface() and "distflash" not in before[2]
    tf.register(df.ContextParallel(Alone()))
    assert "distflash" in AttentionInterface() and "distflash" in AttentionMaskInterface()
    tf.unregister()
    assert state_of_the_library() == before
    tf.unregister()


def test_distflash_itself_does_not_load_transformers():
    code = "import sys, distflash, distflash.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registers_once_and_a_group_only(cp):
    with pytest.raises(ValueError, match=r"registered as 'distflash' already; call unregister\(\)"):
        tf.register(cp)
    with pytest.raises(ValueError, match="cp: expected a ContextParallel"):
        tf.register("distflash")


def test_a_model_changes_its_attention_and_back(cp):
    case = Case("llama")
    model = case.model("eager")
    model.set_attn_implementation("distflash")
    part = tf.shard_batch(case.inputs(), cp)
    assert relative(model(**part).logits, eager(case)["logits"]) <= 1e-5
    tf.unregister()
    with pytest.raises(KeyError, match="distflash"):
        model(**part)
    model.set_attn_implementation("eager")
    assert relative(model(input_ids=case.inputs()["input_ids"]).logits, eager(case)["logits"]) <= 1e-5


# Parts of a batch ----------------------------------------------------------------------------------------------------


def whole_batch(batch_size=2, lengths=(S,)):
    return Case("llama", lengths, batch=batch_size).inputs()


def parts_of(batch, world_size, layout):
    return Simulator(world_size).run(lambda t: tf.shard_batch(batch, df.ContextParallel(t, layout)))


@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(S,), (1, 3, 7)], ids=str)
def test_parts_are_the_batch_with_labels_shifted_before(lengths, world_size, layout):
    batch = whole_batch(lengths=lengths)
    following = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), -100)], 1)
    for rank, part in enumerate(parts_of(batch, world_size, layout)):
        mine = layout.positions(S, world_size, rank)
        assert torch.equal(part["input_ids"], batch["input_ids"][:, mine])
        assert torch.equal(part["shift_labels"], following[:, mine])
        assert torch.equal(part["position_ids"], batch["position_ids"][:, mine])
        assert torch.equal(part["attention_mask"], torch.ones(2, len(mine)))
        assert part["use_cache"] is False
        shard = part["distflash"]
        assert shard.seq_len == S
        assert shard.documents == (None if len(lengths) == 1 else df.Documents([0, 1, 4, S]))


@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(S,), (1, 3, 7)], ids=str)
def test_shifts_are_those_of_each_document_before_it_is_sharded(lengths, world_size, layout):
    batch, shifts = whole_batch(lengths=lengths), (1, 2, 5, S)

    def ahead(x, by, fill):
        parts = x.split(lengths, 1)
        return torch.cat([torch.cat([part[:, by:], torch.full_like(part[:, :by], fill)], 1) for part in parts], 1)

    shards = Simulator(world_size).run(
        lambda t: tf.shard_batch(batch, df.ContextParallel(t, layout), shifts=shifts)["shifted"]
    )
    for rank, part in enumerate(shards):
        mine = layout.positions(S, world_size, rank)
        assert tuple(part.tokens) == tuple(part.labels) == shifts
        for by in shifts:
            assert torch.equal(part.tokens[by], ahead(batch["input_ids"], by, 0)[:, mine])
            assert torch.equal(part.labels[by], ahead(batch["labels"], by, -100)[:, mine])


def test_labels_that_are_shifted_are_shifted_by_one_less(cp):
    ids = torch.arange(1, 9)[None]
    batch = {"input_ids": ids, "shift_labels": ids + 1, "cu_seqlens": [0, 3, 8]}
    labels = tf.shard_batch(batch, cp, shifts=[1, 3])["shifted"].labels
    assert torch.equal(labels[1], ids + 1)
    assert labels[3].tolist() == [[4, -100, -100, 7, 8, 9, -100, -100]]
    without = tf.shard_batch({"input_ids": ids}, cp, shifts=(2,))["shifted"]
    assert without.labels == {} and without.tokens[2].tolist() == [[3, 4, 5, 6, 7, 8, 0, 0]]


@pytest.mark.parametrize("shifts", [2, (0,), (1, -1), (True,), (1.0,), "12", None], ids=repr)
def test_shifts_are_positive_numbers(shifts, cp):
    with pytest.raises(ValueError, match="shifts: expected numbers of tokens, each at least 1, as in"):
        tf.shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.int64)}, cp, shifts=shifts)


def test_documents_from_lengths_are_those_from_positions():
    ids = whole_batch()["input_ids"]
    cu_seqlens = torch.tensor([0, 1, 4, S], dtype=torch.int32)
    by_positions = parts_of(
        {"input_ids": ids, "position_ids": whole_batch(1, (1, 3, 7))["position_ids"]}, 2, df.Zigzag()
    )
    for names in (["cu_seqlens"], ["cu_seq_lens_q", "cu_seq_lens_k"]):
        by_lengths = parts_of({"input_ids": ids, **dict.fromkeys(names, cu_seqlens), "max_length_q": 7}, 2, df.Zigzag())
        for part, expected in zip(by_lengths, by_positions, strict=True):
            assert part["distflash"] == expected["distflash"]
            assert torch.equal(part["position_ids"], expected["position_ids"])
    one = parts_of({"input_ids": ids, "cu_seqlens": [0, S]}, 1, df.Zigzag())[0]
    assert one["distflash"].documents is None


def test_what_collators_return_is_taken(cp):
    case = Case("llama", (4, 9), batch=1)
    ids = case.inputs()["input_ids"][0]
    features = [{"input_ids": ids[:4].tolist()}, {"input_ids": ids[4:].tolist()}]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    part = tf.shard_batch(collate(features), cp)
    assert part["distflash"].documents == df.Documents([0, 4, 13])
    out = case.model("distflash")(**part)
    assert relative(out.logits, eager(case)["logits"]) <= 1e-5


def test_helpers_shard_labels_and_positions():
    labels = whole_batch()["labels"]

    def work(transport):
        cp = df.ContextParallel(transport, df.Contiguous())
        documents = df.Documents([0, 6, S])
        return tf.shard_labels(labels, cp), tf.shard_position_ids(S, cp), tf.shard_position_ids(S, cp, documents)

    (first, positions, in_documents), (second, *_) = Simulator(2).run(work)
    assert torch.equal(torch.cat([first, second], 1)[:, :-1], labels[:, 1:]) and (second[:, -1] == -100).all()
    assert positions.tolist() == [0, 1, 2, 3, 4] and in_documents.tolist() == [0, 1, 2, 3, 4]
    assert first[0, -1] == labels[0, 5]  # the label that the next rank's first token is


def test_the_number_to_divide_by_is_a_ranks_share_and_may_be_given():
    batch, total, layer = whole_batch(), torch.tensor(6.0), torch.nn.Identity()
    count = int((batch["labels"][:, 1:] != -100).sum())
    for given, expected in ((None, count), (24, 24), (torch.tensor(24), 24)):
        for part in parts_of({**batch, "num_items_in_batch": given}, 2, df.Zigzag()):
            part["distflash"].trace.note(layer)
            assert total / part["num_items_in_batch"] == 6 / (expected / 2)


def test_a_part_survives_the_way_out_of_a_data_loaders_worker(cp):
    case = Case("llama")
    for batch in (case.inputs(), {"input_ids": case.inputs()["input_ids"]}):
        part = pickle.loads(pickle.dumps(tf.shard_batch(batch, cp)))
        assert relative(case.model("distflash")(**part).logits, eager(case)["logits"]) <= 1e-5


IDS = torch.arange(8).view(1, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distflash": None}, "batch: has been sharded already"),
        ({"inputs_embeds": IDS}, "batch: holds 'inputs_embeds', which shard_batch does not know"),
        ({"pixel_values": IDS}, "batch: holds 'pixel_values'; images, video and audio are not supported"),
        ({"input_ids": [[1, 2]]}, r'input_ids: expected a tensor \[batch, seq_len\], got list.*return_tensors="pt"'),
        ({"input_ids": IDS[0]}, r"input_ids: expected a tensor \[batch, seq_len\], got \[8\]"),
        ({"input_ids": None}, r"batch: has no input_ids, a tensor \[batch, seq_len\]"),
        ({"input_ids": IDS.float()}, "input_ids: expected integers, got torch.float32"),
        ({"input_ids": IDS[:0]}, "input_ids: 0 sequences of 8 tokens; models cannot run on no tokens"),
        ({3: IDS}, "batch: holds '3', which shard_batch does not know"),
        ({"labels": IDS.float()}, "labels: expected integers, got torch.float32"),
        ({"labels": IDS, "num_items_in_batch": "all"}, "num_items_in_batch: expected a number, got str"),
        ({"labels": IDS, "num_items_in_batch": IDS}, r"num_items_in_batch: expected a number, got \[1, 8\]"),
        ({"position_ids": IDS.repeat(3, 1)}, r"position_ids: expected a tensor \[1, 8\].*got \[3, 8\]"),
        ({"labels": IDS[:, 1:]}, r"labels: expected a tensor \[1, 8\], as input_ids, got \[1, 7\]"),
        ({"labels": IDS + 1}, "labels: are the tokens that follow, so shifted already; pass them as shift_labels"),
        ({"shift_labels": IDS}, "shift_labels: are the tokens themselves.*pass them as labels"),
        ({"attention_mask": (IDS > 1).long()}, "attention_mask: has other values than 1.*DataCollatorWithFlattening"),
        ({"position_ids": IDS + 4}, r"position_ids: expected 0, 1, 2.*was this batch sharded already\?"),
        ({"position_ids": IDS * 2}, r"position_ids: expected 0, 1, 2"),
        ({"position_ids": IDS.expand(3, 1, 8)}, r"position_ids: expected a tensor \[1, 8\].*got \[3, 1, 8\]"),
        ({"cu_seqlens": [0, 3, 7]}, "cu_seqlens: ends at 7, but the sequence has 8 tokens"),
        ({"cu_seqlens": [0, 3, 8], "position_ids": IDS}, "cu_seqlens and position_ids tell of different documents"),
        ({"cu_seq_lens_q": [0, 3, 8], "cu_seq_lens_k": [0, 4, 8]}, "cu_seq_lens_q and cu_seq_lens_k tell of different"),
    ],
    ids=lambda x: ", ".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_batches_that_are_refused(changes, words, cp):
    with pytest.raises(ValueError, match=words):
        tf.shard_batch({"input_ids": IDS, **changes}, cp)


def test_what_is_no_batch_or_no_group_is_refused(cp):
    for batch in (IDS, [IDS], None):
        with pytest.raises(ValueError, match="batch: expected tensors by name, as a collator returns them, got"):
            tf.shard_batch(batch, cp)
    with pytest.raises(ValueError, match="cp: expected the ContextParallel that register was given, got NoneType"):
        tf.shard_batch({"input_ids": IDS}, None)


@pytest.mark.parametrize("layout", [df.Contiguous(), df.Zigzag(), df.Striped()], ids=repr)
def test_fewer_tokens_than_ranks_are_refused_on_every_rank(layout):
    def work(transport):
        with pytest.raises(ValueError, match=r"input_ids: 1 sequences of 2 tokens, which leaves 1 of 3 ranks without"):
            tf.shard_batch({"input_ids": IDS[:, :2]}, df.ContextParallel(transport, layout))
        return True

    assert Simulator(3).run(work) == [True] * 3


def test_sequences_that_are_packed_differently_are_refused(cp):
    positions = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]])
    with pytest.raises(ValueError, match="position_ids: the sequences of the batch are packed differently"):
        tf.shard_batch({"input_ids": torch.ones_like(positions), "position_ids": positions}, cp)


def test_a_part_that_was_sharded_before_is_refused(cp):
    part = tf.shard_batch(whole_batch(), cp)
    with pytest.raises(ValueError, match="sharded already"):
        tf.shard_batch(part, cp)
    for part in parts_of(whole_batch(), 2, df.Zigzag()):  # and where only tensors were kept of it
        with pytest.raises(ValueError, match="sharded already"):
            tf.shard_batch({name: part[name] for name in ("input_ids", "position_ids")}, cp)


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["", "sliding_window_"])
def test_a_described_mask_is_the_librarys_matrix(kind, causal, cp):
    create = getattr(masking_utils, f"create_{'' if causal else 'bidirectional_'}{kind}{'causal_' * causal}mask")
    config = LlamaConfig(**SMALL)
    config.sliding_window = 4
    asked = dict(inputs_embeds=torch.zeros(1, S, 1), attention_mask=torch.ones(1, S), past_key_values=None)
    if not causal and not kind:
        asked = {name: x for name, x in asked.items() if name != "past_key_values"}
    described, matrix = (create(config, **asked) for config._attn_implementation in ("distflash", "eager"))
    expected = torch.ones(S, S, dtype=torch.bool) if matrix is None else matrix[0, 0] == 0
    assert torch.equal(described.mask.materialize(torch.arange(S), torch.arange(S)), expected)


def test_a_model_that_is_told_not_to_be_causal(cp):
    config = LlamaConfig(**SMALL, is_causal=False)
    ids = whole_batch()["input_ids"]
    outputs = []
    for attention, batch in (("eager", {"input_ids": ids}), ("distflash", tf.shard_batch({"input_ids": ids}, cp))):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        outputs.append(model(**batch).logits)
    assert relative(*outputs) <= 1e-5
    assert relative(outputs[1], eager(Case("llama", (S,)))["logits"]) > 1e-2


# What a call cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"distflash": None},
            r"batch: nothing that shard_batch adds has reached the attention of LlamaAttention; pass the model all",
        ),
        ({"position_ids": torch.arange(S)[None] + 1}, "position_ids: are not those of this rank's tokens"),
        ({"use_cache": True}, "use_cache: not supported; a KV cache"),
        ({"output_attentions": True}, "output_attentions: not supported; no rank computes"),
        ({"prefix": 3}, "prefix: not supported; it is not known here and may change the attention"),
        ({"attention_mask": torch.ones(2, S).tril()}, "attention_mask: has zeros; padding is not supported"),
        ({"attention_mask": torch.ones(2, 2 * S)}, "attention_mask: 22 keys for 11 queries"),
        ({"attention_mask": torch.zeros(2, 1, S, S)}, "attention_mask: expected the mask .* got Tensor; matrices"),
    ],
    ids=lambda x: ", ".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_calls_that_are_refused(changes, words, cp):
    part = {**tf.shard_batch(whole_batch(), cp), **changes}
    with pytest.raises(ValueError, match=words):
        Case("llama").model("distflash")(**part)


def test_a_cache_of_the_library_is_refused(cp):
    case = Case("gemma2", (S,))  # whose layers do not say that there is one
    model, part = case.model("distflash"), tf.shard_batch(case.inputs(), cp)
    with pytest.raises(ValueError, match=r"past_key_values: a DynamicCache would hold .* pass .*ShardedCache\(cp\)"):
        model(**part, past_key_values=DynamicCache())


def dropping_model(attention):
    """In training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, attention_dropout=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def with_gradients(model, batch):
    out = model(**batch)
    out.loss.backward()
    return results(model, out.logits, out.loss)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_dropout_is_eagers_with_the_oracles_masks(cp, checkpointed, monkeypatch):
    model = dropping_model("distflash")
    if checkpointed:
        enable_checkpointing(model, {"use_reentrant": False})
    got = with_gradients(model, tf.shard_batch({**whole_batch(), "dropout_seed": 7}, cp))
    layers, here = itertools.count(), torch.arange(S)

    def dropped(x, p, training):
        kept = df.dropout_mask(7 + (next(layers) << 40), p, *x.shape[:2], here, here)
        return x * kept / (1 - round(p * 2**16) / 2**16)

    eager_model = dropping_model("eager")
    monkeypatch.setattr(torch.nn.functional, "dropout", dropped)
    expected = with_gradients(eager_model, whole_batch())
    assert next(layers) == SMALL["num_hidden_layers"]
    assert max(relative(got[name], x) for name, x in expected.items()) <= 1e-5


def test_attention_dropout_is_of_training_and_of_the_batchs_seed(cp):
    model = dropping_model("distflash")
    first, again, other = (model(**tf.shard_batch({**whole_batch(), "dropout_seed": n}, cp)).logits for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    evaluated = model.eval()(**tf.shard_batch(whole_batch(), cp)).logits
    assert relative(evaluated, dropping_model("eager").eval()(**whole_batch()).logits) <= 1e-5


def test_attention_dropout_without_a_seed_is_refused_in_training(cp):
    with pytest.raises(ValueError, match=r"dropout: attention dropout of 0.3 needs a seed .*put dropout_seed into the"):
        dropping_model("distflash")(**tf.shard_batch(whole_batch(), cp))
    for seed in (-1, 2**40, 1.5, "1"):
        with pytest.raises(ValueError, match=r"dropout_seed: expected an int from 0 to 2\*\*40 - 1, such as the step"):
            tf.shard_batch({**whole_batch(), "dropout_seed": seed}, cp)


def test_attention_dropout_of_layers_without_a_number_is_refused(cp):
    model = dropping_model("distflash")
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(ValueError, match="dropout: LlamaAttention has no layer_idx"):
        model(**tf.shard_batch({**whole_batch(), "dropout_seed": 7}, cp))


def test_batches_of_different_seeds_are_different_batches():
    def work(transport):
        cp = df.ContextParallel(transport)
        shard = tf.shard_batch({**whole_batch(), "dropout_seed": transport.rank}, cp)["distflash"]
        with pytest.raises(ValueError, match="dropout_seed differs between rank 0 and rank 1"):
            require_same_batch(shard, cp)

    Simulator(2).run(work)


def test_a_part_for_other_ranks_is_refused(cp):
    for part in parts_of(whole_batch(), 2, df.Zigzag()):
        with pytest.raises(ValueError, match=r"batch: was sharded for rank \d of 2, Zigzag\(\), but ContextParallel"):
            Case("llama").model("distflash")(**part)


# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_with_another_attention_gives_no_loss(attention, own, cp):
    model = Case("llama").model(attention)
    if own:
        model.loss_function = tf.loss_function(cp)
    words = f"no layer of the model has used distflash.*LlamaModel has '{attention}': give the model attn_impl"
    with pytest.raises(ValueError, match=words):
        model(**tf.shard_batch(whole_batch(), cp))


def test_labels_that_shard_batch_has_not_seen_give_no_loss(cp):
    batch, model = whole_batch(), Case("llama").model("distflash")
    with pytest.raises(ValueError, match=r"labels: the batch had none when it was sharded.*before it is sharded"):
        model(**tf.shard_batch({"input_ids": batch["input_ids"]}, cp), labels=batch["labels"])
    model.loss_function = tf.loss_function(cp)
    with pytest.raises(ValueError, match="batch: was not sharded, or had no labels"):
        model(**tf.shard_batch({"input_ids": batch["input_ids"]}, cp), labels=batch["labels"])


def test_a_loss_that_would_shift_a_part_is_told_so(cp):
    labels = tf.shard_batch(whole_batch(), cp)["labels"]
    for read in (
        lambda: labels[..., 1:],
        lambda: labels.view(-1),
        lambda: torch.nn.functional.pad(labels, (0, 1)),
        lambda: torch.nn.functional.cross_entropy(torch.zeros(3, 4), labels),
    ):
        with pytest.raises(ValueError, match=r"labels: this model's loss reads `labels`.*loss_function"):
            read()
    assert not hasattr(labels, "to")  # who moves what can be moved leaves it alone
    config = BertConfig(**{**SMALL, "attention_probs_dropout_prob": 0.0}, attn_implementation="distflash")
    with pytest.raises(ValueError, match="labels: this model's loss reads `labels`"):
        BertForMaskedLM(config)(**tf.shard_batch(whole_batch(), cp))


# Together with the rest ----------------------------------------------------------------------------------------------


def test_autocast_is_as_exact_as_eager_under_autocast(cp):
    errors = {"eager": [], "distflash": []}
    for case in map(Case, CONFIGS):
        for attention, relative_errors in errors.items():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                batch = {"input_ids": case.inputs()["input_ids"]}
                part = batch if attention == "eager" else tf.shard_batch(batch, cp)
                logits = case.model(attention)(**part).logits
            relative_errors.append(relative(logits, eager(case)["logits"]))
    assert math.hypot(*errors["distflash"]) <= 1.1 * math.hypot(*errors["eager"]), errors


def test_checkpointing_that_keeps_attention_does_not_run_it_twice():
    case, kernel = Case("gemma2"), Counting()
    cp = df.ContextParallel(Alone(), kernel=kernel)
    tf.register(cp)
    try:
        model = case.model("distflash")
        enable_checkpointing(model, {"use_reentrant": False, "context_fn": df.keep_attention})
        out = model(**tf.shard_batch(case.inputs(), cp))
        out.loss.backward()
    finally:
        tf.unregister()
    assert kernel.forwards == len(model.model.layers)
    got, expected = results(model, out.logits, out.loss), eager(case)
    assert all(relative(got[name], expected[name]) <= 1e-5 for name in expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_layers_compile_without_a_graph_break(family, cp):
    case = Case(family, (1, 11, 25))
    part = tf.shard_batch(case.inputs(), cp)
    model = case.model("distflash")
    for layer in model.model.layers:
        # Not all versions of the library can compile gpt-oss's experts on CPUs.
        compiled = layer.self_attn if family == "gpt_oss" else layer
        compiled.compile(fullgraph=True, backend="aot_eager")
    out = model(**part)
    out.loss.backward()
    got, expected = results(model, out.logits, out.loss), eager(case)
    assert all(relative(got[name], expected[name]) <= 1e-5 for name in expected)
    torch._dynamo.reset()


def test_balanced_is_chosen_for_the_documents_of_each_batch():
    for ends in ([0, 3, 20, 41], [0, 30, 41]):
        ids = torch.arange(41)[None]

        def run(transport, ids=ids, ends=ends):
            cp = df.ContextParallel(transport, df.Balanced(chunk=4))
            part = tf.shard_batch({"input_ids": ids, "cu_seqlens": ends}, cp)
            assert tf.batch.group_problem(part[tf.batch.NAME], cp) is None
            return part["input_ids"][0], part["position_ids"][0], cp.with_mask(df.Causal() & df.Documents(ends))

        for held, places, cp in df.transport.Simulator(3).run(run):
            assert torch.equal(held, cp.positions(41))
            start = torch.tensor(ends)[torch.searchsorted(torch.tensor(ends), held, right=True) - 1]
            assert torch.equal(places, held - start)
