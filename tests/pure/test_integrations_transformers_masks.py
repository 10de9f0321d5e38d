"""Masks composed of Transformers' functions: converted, or an error."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import blockwise_overlay, sliding_window_bidirectional_overlay, sliding_window_overlay
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

import distflash as df
from distflash.integrations import transformers as tf
from distflash.integrations.transformers import mask_functions
from distflash.integrations.transformers.masks import LayerMask
from distflash.integrations.transformers.scales import scale_problem
from distflash.transport import Alone, Simulator
from tests.tiny_models import CONFIGS_OF_MASKS, SMALL, TYPES, Case, eager, relative, results

S = 23
EACH = torch.arange(S)


@pytest.fixture
def cp():
    """One rank, registered."""
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    yield cp
    tf.unregister()


def raises(words):
    return pytest.raises(ValueError, match=words)


def config(attention):
    config = LlamaConfig(**SMALL)
    config.sliding_window, config.attention_chunk_size = 5, 4
    config._attn_implementation = attention
    return config


def ask(create, attention, batch=1, **more):
    given = dict(inputs_embeds=torch.zeros(batch, S, 1), attention_mask=torch.ones(batch, S), past_key_values=None)
    return getattr(masking_utils, create)(config(attention), **given | more)


def random_ids(seed):
    """Blocks as models number them, some of one token, some next to each other; negative outside."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, (S,), generator=generator).tolist()
    ids = torch.cat([torch.full((n,), k if k % 3 or seed % 2 else -1) for k, n in enumerate(lengths)])
    return ids[:S].expand(1, -1)


# What is read ---------------------------------------------------------------------------------------------------------

CREATED = ["create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"]
LAID_OVER = {
    "nothing": lambda ids: {},
    "blocks": lambda ids: dict(block_sequence_ids=ids),
    "a window over blocks": lambda ids: dict(
        or_mask_function=blockwise_overlay(ids), and_mask_function=sliding_window_overlay(3)
    ),
    "blocks as a function": lambda ids: dict(or_mask_function=blockwise_overlay(ids)),
    "a window beside it": lambda ids: dict(or_mask_function=sliding_window_bidirectional_overlay(2)),
    "nested": lambda ids: dict(
        or_mask_function=masking_utils.and_masks(
            masking_utils.or_masks(blockwise_overlay(ids), sliding_window_bidirectional_overlay(1)),
            sliding_window_bidirectional_overlay(3),
            masking_utils.chunked_overlay(7, torch.zeros(1, dtype=torch.int64)),
        )
    ),
}


# Chunks take no block_sequence_ids in 5.17.
COMBINED = [(c, over) for c in CREATED for over in LAID_OVER if (c, over) != ("create_chunked_causal_mask", "blocks")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("create", "over"), COMBINED)
def test_a_composed_mask_is_the_librarys_matrix(create, over, seed, cp):
    more = LAID_OVER[over](random_ids(seed))
    described, matrix = (ask(create, attention, **more) for attention in ("context_parallel", "eager"))
    assert described.problem is None and described.shape == matrix.shape
    assert torch.equal(described.mask.materialize(EACH, EACH), matrix[0, 0] == 0)


def test_blocks_in_a_causal_mask_are_image_blocks(cp):
    ids = torch.full((1, S), -1)
    assert ask("create_causal_mask", "distflash", block_sequence_ids=ids).mask == df.ImageBlocks([], [])
    ids[0, 3:9], ids[0, 9:11] = 0, 1
    described = ask("create_causal_mask", "distflash", block_sequence_ids=ids)
    assert described.mask == df.ImageBlocks([3, 9], [6, 2])
    assert described.problem_with(shard()) is None


def test_blocks_beside_a_window_are_one_interval_a_query(cp):
    described = ask("create_sliding_window_causal_mask", "distflash", block_sequence_ids=random_ids(0))
    assert len(described.mask.parts(EACH, S)) == 1


def test_a_mask_that_was_made_for_another_model_is_its_mask(cp):
    outer = ask("create_sliding_window_causal_mask", "distflash")
    assert ask("create_causal_mask", "distflash", attention_mask=outer) is outer


def shard(documents=None, seq_len=S, world_size=1):
    return tf.Shard(df.Zigzag(), world_size, 0, seq_len, documents)


def test_chunks_are_counted_in_each_document(cp):
    mask = ask("create_chunked_causal_mask", "context_parallel").within(df.Documents([0, 6, 7, S]))
    alone = [(df.Causal() & df.Chunked(4)).materialize(EACH[:n], EACH[:n]).long() for n in (6, 1, 16)]
    expected = torch.block_diag(*alone)
    assert torch.equal(mask.materialize(EACH, EACH), expected.bool())


# What is refused ------------------------------------------------------------------------------------------------------


def first_keys(batch, head, query, key):
    return key < 2


@pytest.mark.parametrize("more", [dict(or_mask_function=first_keys), dict(and_mask_function=lambda *_: True)])
def test_functions_that_are_not_known_are_refused(more, cp):
    described = ask("create_causal_mask", "distflash", **more)
    name = next(iter(more.values())).__qualname__
    assert described.mask is None
    assert f"the model asks for the mask function {name} of {__name__}, which is not supp" in described.problem


def test_packed_documents_that_the_library_finds_in_a_part_are_refused(cp):
    positions = torch.tensor([[*range(4), *range(S - 4)]])
    described = ask("create_causal_mask", "distflash", attention_mask=None, position_ids=positions)
    assert "packed_sequence_mask_function" in described.problem
    assert "attention_mask was left out of the call: pass the model all that shard_batch" in described.problem


def test_a_function_that_the_installed_library_defines_otherwise_is_not_known(monkeypatch, cp):
    def sliding_window_overlay(sliding_window):
        return lambda batch_idx, head_idx, q_idx, kv_idx: kv_idx >= q_idx - sliding_window

    def or_masks(*mask_functions):
        return lambda *args: mask_functions[0](*args) & mask_functions[1](*args)

    caches = mask_functions._readings, mask_functions._combinations, mask_functions._blocks_code
    try:
        for name, changed, more in (
            ("sliding_window_overlay", sliding_window_overlay, {}),
            ("or_masks", or_masks, dict(or_mask_function=sliding_window_bidirectional_overlay(2))),
        ):
            monkeypatch.setattr(masking_utils, name, changed)
            for cache in caches:
                cache.cache_clear()
            described = ask("create_sliding_window_causal_mask", "distflash", **more)
            assert f"{name}.<locals>.<lambda>" in described.problem
            monkeypatch.undo()
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_sizes_that_make_no_window_are_refused(size, cp):
    described = ask("create_causal_mask", "distflash", and_mask_function=sliding_window_overlay(size))
    assert described.problem == f"mask: the model asks for keys within {size} tokens; expected an int of at least 1"


def test_sequences_with_images_in_different_places_are_refused(cp):
    ids = torch.full((2, S), -1)
    ids[1, 4:6] = 0
    described = ask("create_causal_mask", "distflash", batch=2, block_sequence_ids=ids)
    assert "have their images or prefixes in different places, but one mask" in described.problem


def test_blocks_of_a_part_of_the_tokens_are_refused(cp):
    described = ask("create_causal_mask", "distflash", block_sequence_ids=random_ids(0))
    problem = described.problem_with(shard(seq_len=46, world_size=2))
    assert problem.startswith("mask: the model makes blocks (of images, or of a prefix) from the types of 23 tokens")
    assert 'shard_batch(batch, cp, whole=("token_type_ids",))' in problem


def test_a_block_in_two_places_of_a_document_is_refused(cp):
    ids = torch.full((1, S), -1)
    ids[0, 2:5], ids[0, 9:12] = 0, 0
    described = ask("create_causal_mask", "distflash", block_sequence_ids=ids)
    for documents in (None, df.Documents([0, 4, 10, S]), df.Documents([0, S])):
        assert "tokens before 5 and from 9 on see each other as one block" in described.problem_with(shard(documents))
    for end in (5, 7, 9):
        assert described.problem_with(shard(df.Documents([0, end, S]))) is None


def test_a_mask_with_a_problem_keeps_it_in_another_model(cp):
    outer = ask("create_causal_mask", "distflash", or_mask_function=first_keys)
    assert ask("create_causal_mask", "distflash", attention_mask=outer).problem == outer.problem
    assert LayerMask(problem="because").problem_with(shard()) is None


# Batches --------------------------------------------------------------------------------------------------------------


def parts_of(batch, world_size, **options):
    return Simulator(world_size).run(lambda t: tf.shard_batch(batch, df.ContextParallel(t), **options))


def test_types_of_tokens_are_a_ranks_or_whole():
    types = torch.arange(S).expand(2, -1)
    batch = {"input_ids": types + 1, "token_type_ids": types, "mm_token_type_ids": types}
    for rank, (own, whole) in enumerate(
        zip(parts_of(batch, 2), parts_of(batch, 2, whole=("token_type_ids",)), strict=True)
    ):
        positions = df.Zigzag().positions(S, 2, rank)
        assert torch.equal(own["token_type_ids"], types[:, positions])
        assert torch.equal(whole["token_type_ids"], types)
        assert torch.equal(whole["mm_token_type_ids"], types) and torch.equal(own["mm_token_type_ids"], types)
        assert own["distflash"] == whole["distflash"]
        other = parts_of({**batch, "token_type_ids": types + 1}, 2)[rank]["distflash"]
        assert other != own["distflash"]  # so that ranks that were given different ones are told


@pytest.mark.parametrize("whole", ["token_type_ids", ("input_ids",), None, {"token_type_ids"}])
def test_what_cannot_be_given_whole_is_refused(whole, cp):
    with raises("whole: expected names among token_type_ids, mm_token_type_ids, as in"):
        tf.shard_batch({"input_ids": torch.ones(1, S, dtype=torch.int64)}, cp, whole)


# Models ---------------------------------------------------------------------------------------------------------------


def results_of(case, cp, inputs=None, compiled=False):
    model = case.model("distflash")
    if compiled:
        decoder = getattr(model.model, "language_model", model.model)
        for layer in decoder.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
    out = model(**tf.shard_batch(case.inputs() if inputs is None else inputs, cp, case.whole))
    out.loss.backward()
    return results(model, out.logits, out.loss)


def require_equal(got, expected):
    assert got.keys() == expected.keys()
    errors = {name: relative(got[name], x) for name, x in expected.items() if x.any() or got[name].any()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("family", ["llama4", "gemma3", "paligemma2"])
def test_layers_compile_without_a_graph_break(family, cp):
    torch._dynamo.reset()
    for lengths in ((1, 11, 25), (37,)):
        case = Case(family, lengths)
        require_equal(results_of(case, cp, compiled=True), eager(case))
    torch._dynamo.reset()


@pytest.mark.parametrize("family", TYPES)
def test_models_without_images_or_prefixes(family, cp):
    case = Case(family, (S,))
    inputs = case.inputs()
    inputs[case.types] = torch.full_like(inputs[case.types], TYPES[family][2])
    given = {name: inputs[name] for name in ("input_ids", case.types)}
    expected = case.model("eager")(**given, use_cache=False).logits
    assert relative(results_of(case, cp, inputs)["logits"], expected) <= 1e-5


def test_images_that_meet_where_documents_do_are_two(cp):
    """The library would make one of them; each document is as it is by itself."""
    lengths, case = (9, S - 9), Case("gemma3", (S,))
    inputs = case.inputs()
    types = torch.zeros_like(inputs["token_type_ids"])
    types[:, 5:14] = 1
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    part = tf.shard_batch({**inputs, "token_type_ids": types, "position_ids": positions}, cp, case.whole)
    got = case.model("distflash")(**part).logits
    documents = zip(inputs["input_ids"].split(lengths, 1), types.split(lengths, 1), strict=True)
    model = case.model("eager")
    expected = [model(input_ids=i, token_type_ids=t, use_cache=False).logits for i, t in documents]
    assert relative(got, torch.cat(expected, 1)) <= 1e-5


def test_a_prefix_behind_the_text_is_refused(cp):
    case = Case("paligemma", (S,))
    inputs = case.inputs()
    inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"][:, :-2], torch.zeros(2, 2, dtype=torch.int64)], 1)
    with raises("mask: tokens before 7 and from 21 on see each other as one block"):
        results_of(case, cp, inputs)


# Names ----------------------------------------------------------------------------------------------------------------


def test_chunks_are_refused_by_the_name_that_the_library_refuses(cp):
    case = Case("llama4", (S,))
    model = case.model("distflash")
    part = tf.shard_batch(case.inputs(), cp)
    model(**part)
    model.set_attn_implementation("distflash")
    with raises('attn_implementation: Llama4ForCausalLM attends within chunks of 6.*="context_parallel", which is'):
        model(**part)


def test_both_names_go_with_unregister_unless_they_are_someone_elses(cp):
    names = {"distflash", "context_parallel"}
    assert names <= set(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS) and names <= set(tf.registry.AttentionInterface())
    tf.unregister()
    assert not names & set(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    tf.registry.AttentionInterface.register("context_parallel", first_keys)
    try:
        with raises("register: attention is registered as 'context_parallel' already"):
            tf.register(cp)
        tf.unregister()
        assert tf.registry.AttentionInterface()["context_parallel"] is first_keys
    finally:
        tf.registry.AttentionInterface._global_mapping.pop("context_parallel")


# Scales ---------------------------------------------------------------------------------------------------------------


class OtherScales(Llama4TextAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_scales_that_are_not_known_are_refused(cp):
    model = Case("llama4").model("distflash")
    assert scale_problem(model) is None and scale_problem(nn.Linear(2, 2)) is None
    model.model.layers[1].self_attn = OtherScales(model.config, 1)
    with raises("attn_temperature_tuning: OtherScales scales queries by their position in another way"):
        model(**tf.shard_batch(Case("llama4").inputs(), cp))
    assert CONFIGS_OF_MASKS["llama4"]().attn_temperature_tuning
    model.model.layers[1].self_attn.attn_temperature_tuning = False
    assert scale_problem(model) is None
