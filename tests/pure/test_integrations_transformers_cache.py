"""A ShardedCache on one rank: its content, its memory, and errors."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MaxTimeCriteria,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)

import distflash as df
from distflash.integrations import transformers as tf
from distflash.integrations.transformers.cached_layer import CachedLayer, Sequences
from distflash.transport import Alone, Simulator
from tests.generation import PAD, Generation, on_one_process, over_ranks
from tests.tiny_models import SMALL, Case, relative

GREEDY = Generation("llama", new=8)


@pytest.fixture
def cp():
    """One rank, registered."""
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    yield cp
    tf.unregister()


def prefilled(cp, asked=GREEDY, capacity=None):
    model, (ids, padding), cache = asked.model("distflash"), asked.inputs(), tf.ShardedCache(cp, capacity)
    cache.prefill(model, ids, asked.chunk, padding)
    return model, ids, cache


# What it keeps --------------------------------------------------------------------------------------------------------


def test_prefill_holds_the_last_token_back(cp):
    model, ids, cache = prefilled(cp)
    assert cache.lengths == (36,) and cache.get_seq_length() == 36 and cache.batch_size == 1
    cache.prefill(model, ids)  # nothing is left to do
    assert cache.lengths == (36,)
    out = model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    assert torch.equal(out.sequences, on_one_process(GREEDY).tokens)
    assert cache.lengths == (36 + 8,)
    assert cache.nbytes == sum(layer.cache.nbytes for layer in cache.layers) > 0


def test_padding_is_not_kept(cp):
    *_, cache = prefilled(cp, Generation("llama", lengths=(5, 12, 1)))
    assert cache.lengths == (4, 11, 0) and cache.get_seq_length() == 11
    assert [layer.cache.lengths for layer in cache.layers] == [(4, 11, 0)] * 2


@pytest.mark.parametrize("chunk", [None, 5, 1])
def test_chunks_are_at_their_positions_in_the_sequence(chunk, cp):
    asked, positions = Generation("llama", lengths=(23,), chunk=chunk), []
    model, (ids, _) = asked.model("distflash"), asked.inputs()
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    tf.ShardedCache(cp).prefill(model, ids, chunk)
    assert max(x.shape[1] for x in positions) == (chunk or 22)
    assert torch.equal(torch.cat(positions, 1), torch.arange(22)[None])


def test_few_tokens_need_no_prefill(cp):
    model, ids = GREEDY.model("distflash"), GREEDY.inputs()[0]
    out = model.generate(ids, past_key_values=tf.ShardedCache(cp), **GREEDY.arguments())
    assert torch.equal(out.sequences, on_one_process(GREEDY).tokens)


def test_drafts_that_are_rejected_are_forgotten(cp):
    asked, crops = Generation("mistral", "lookup", (30,), new=40), []

    class Counting(tf.ShardedCache):
        def crop(self, tokens_to_remove):
            super().crop(tokens_to_remove)
            crops.append((tokens_to_remove, {layer.lengths for layer in self.layers}))

    model, (ids, _), cache = asked.model("distflash"), asked.inputs(), Counting(cp)
    cache.prefill(model, ids)
    out = model.generate(ids, past_key_values=cache, **asked.arguments())
    assert torch.equal(out.sequences, on_one_process(asked).tokens)
    assert {n < 0 for n, _ in crops} == {True, False}  # some were rejected, at times none
    assert all(len(lengths) == 1 for _, lengths in crops)
    assert crops[-1][1] == {(out.sequences.shape[1] - 1,)}


def test_a_turn_that_is_taken_back_is_as_if_it_had_not_been(cp):
    model, ids, cache = prefilled(cp)
    model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    cache.crop(-8)
    assert cache.lengths == (36,)
    out = model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    assert torch.equal(out.sequences, on_one_process(GREEDY).tokens)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and cache.batch_size == -1
    assert torch.equal(over_ranks(GREEDY, cp).tokens, out.sequences)


def test_one_of_several_sequences_goes_on(cp):
    asked = Generation("llama", "several", new=6)
    model, ids, cache = prefilled(cp, asked)
    out = model.generate(ids, past_key_values=cache, **asked.arguments()).sequences
    assert cache.batch_size == 3
    cache.batch_select_indices(torch.tensor([2]))
    longer = torch.cat([out[2:], ids[:, :9]], 1)
    cache.prefill(model, longer, chunk=4)
    got = model.generate(longer, past_key_values=cache, **GREEDY.arguments()).sequences
    assert torch.equal(got, GREEDY.model("eager").generate(longer, **GREEDY.arguments()).sequences)


def test_what_was_prefilled_in_inference_mode_goes_on_outside(cp):
    with torch.inference_mode():
        model, ids, cache = prefilled(cp)
    out = model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    assert torch.equal(out.sequences, on_one_process(GREEDY).tokens)


def test_compiled_layers_generate_the_same(cp):
    asked = Generation("gemma2", lengths=(20,), new=3)
    model, (ids, _), cache = asked.model("distflash"), asked.inputs(), tf.ShardedCache(cp)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    cache.prefill(model, ids, asked.chunk)
    out = model.generate(ids, past_key_values=cache, **asked.arguments())
    assert torch.equal(out.sequences, on_one_process(asked).tokens)
    torch._dynamo.reset()


# Memory ---------------------------------------------------------------------------------------------------------------


def grown(transport, mask, capacity, steps, expected=0):
    """A layer that is given chunks and tokens, and its capacity after each; tensors are those of seed 0."""
    cp = df.ContextParallel(transport)
    layer = CachedLayer(Sequences(cp, capacity, expected, batch=1))
    generator, capacities, outs = torch.Generator().manual_seed(0), [], []
    for n, sharded in steps:
        q, k, v = (torch.randn(1, n, heads, 8, generator=generator) for heads in (4, 2, 2))
        if sharded:
            out = layer.attend(*(cp.shard(x, 1) for x in (q, k, v)), mask, n)
            out = cp.unshard(out, 1)
        else:
            out = layer.attend(q, k, v, mask, None)
        outs.append(out)
        capacities.append(layer.cache.capacity)
    return torch.cat(outs, 1), capacities


STEPS = [(50, True), (37, True), (1, False), (100, True), (3, False), *[(1, False)] * 120]


def dense(mask, steps):
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(1, n, heads, 8, generator=generator) for heads in (4, 2, 2)] for n, _ in steps]
    q, k, v = (torch.cat(x, 1).double().transpose(1, 2) for x in zip(*parts, strict=True))
    seen = mask.materialize(torch.arange(q.shape[2]), torch.arange(q.shape[2]))
    return scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_memory_grows_with_the_sequence_and_stays_bounded_where_a_mask_forgets(world_size):
    total = sum(n for n, _ in STEPS)
    for mask, bounded in ((df.Causal(), False), (df.Window(20, 0), True), (df.Causal() & df.Chunked(32), True)):
        ((out, capacities), *_) = Simulator(world_size).run(lambda t, mask=mask: grown(t, mask, None, STEPS))
        assert relative(out, dense(mask, STEPS)) <= 1e-6
        assert capacities == sorted(capacities)
        if bounded:
            assert capacities[-1] <= 32 + 128 < total
        else:
            assert total <= capacities[-1] <= 3 * total and len(set(capacities)) < 6


def test_what_is_expected_is_allocated_at_once():
    _, capacities = grown(Alone(), df.Causal(), None, [(10, True), (10, False)], expected=500)
    assert capacities[0] == capacities[1] >= 500
    _, capacities = grown(Alone(), df.Window(20, 0), None, [(10, True), (10, False)], expected=500)
    assert capacities[0] == capacities[1] < 500


def test_a_capacity_is_kept_to(cp):
    model, ids, cache = prefilled(cp, capacity=40)
    assert {layer.cache.capacity for layer in cache.layers} == {40}
    with pytest.raises(ValueError, match=r"1 more tokens do not fit beside the 40 .* capacity=40"):
        model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    assert cache.lengths == (40,)
    cache.crop(-4)
    few = Generation("llama", new=4)
    out = model.generate(ids, past_key_values=cache, **few.arguments())
    assert torch.equal(out.sequences, on_one_process(few).tokens)


# A forward that raises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1])
def test_a_step_that_breaks_off_is_taken_back(at, cp):
    model, ids, cache = prefilled(cp)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[at].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        model(ids[:, -1:], position_ids=torch.tensor([[36]]), past_key_values=cache)
    handle.remove()
    if at:  # all layers have had the token
        assert cache.lengths == (37,)
        cache.crop(-1)
    out = model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    assert torch.equal(out.sequences, on_one_process(GREEDY).tokens)


def test_layers_that_have_never_had_the_first_tokens_are_refused(cp):
    model, ids = GREEDY.model("distflash"), GREEDY.inputs()[0]
    cache, mlp = tf.ShardedCache(cp), model.model.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.prefill(model, ids)
    handle.remove()
    with pytest.raises(ValueError, match=r"layer 1 has had \(0,\) tokens .*reset\(\), and prefill again"):
        model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    cache.reset()
    cache.prefill(model, ids)
    out = model.generate(ids, past_key_values=cache, **GREEDY.arguments())
    assert torch.equal(out.sequences, on_one_process(GREEDY).tokens)


# Refused --------------------------------------------------------------------------------------------------------------


def test_arguments_of_another_kind_are_refused(cp):
    with pytest.raises(ValueError, match="cp: expected the ContextParallel that register was given, got str"):
        tf.ShardedCache("cp")
    for capacity in (0, 1.5, True):
        with pytest.raises(ValueError, match="capacity: expected a number of tokens"):
            tf.ShardedCache(cp, capacity)
    model, ids, cache = prefilled(cp)
    padded = torch.ones_like(ids)
    padded[0, -1] = 0
    for arguments, words in (
        ((model, ids[0]), r"ids: expected a tensor of integers \[batch, tokens\], .* got \[37\]"),
        ((model, ids.float()), "ids: expected a tensor of integers"),
        ((model, ids, 0), "chunk: expected a number of tokens, at least 1, or None, got 0"),
        ((model, ids, None, padded[:, 1:]), r"attention_mask: expected a tensor \[1, 37\], as ids"),
        ((model, ids, None, padded), "attention_mask: expected zeros on the left.*padding_side='left'"),
        ((model, ids[:, :36]), "ids: 36 tokens, and the cache has had 36; expected more"),
        ((model, ids.expand(2, -1)), "ids: 2 sequences, and the cache has 1; expected as many"),
        ((Case("llama").model("sdpa"), ids), "the model has 'sdpa'; expected \"distflash\", after register"),
    ):
        with pytest.raises(ValueError, match=words):
            cache.prefill(*arguments)
    with pytest.raises(ValueError, match="tokens_to_remove: expected the number of tokens with a minus, got 3"):
        cache.crop(3)
    assert cache.lengths == (36,)


def test_tokens_that_do_not_follow_those_of_the_cache_are_refused(cp):
    model, ids, cache = prefilled(cp)
    arguments = GREEDY.arguments()
    with pytest.raises(ValueError, match=r"position_ids: of \d+ new tokens are not those behind .*\(36,\) tokens"):
        model.generate(ids[:, :20], past_key_values=cache, **arguments)
    with pytest.raises(ValueError, match="position_ids: of 1 new tokens"), torch.no_grad():
        model(ids[:, -1:], position_ids=torch.tensor([[35]]), past_key_values=cache)
    model.generate(ids, past_key_values=cache, **arguments)
    with pytest.raises(ValueError, match="position_ids"):  # of a turn that has been had
        model.generate(ids, past_key_values=cache, **arguments)


def test_a_turn_that_begins_with_another_prompt_is_refused(cp):
    model, ids, cache = prefilled(cp)
    other = torch.cat([ids, ids[:, :9]], 1)
    other[0, 7] += 1
    with pytest.raises(ValueError, match=r"ids: token 7 of sequence 0 is \d+, where the cache has had \d+; .*reset"):
        cache.prefill(model, other)
    assert cache.lengths == (36,)
    cache.crop(-30)  # what differs is forgotten
    cache.prefill(model, other)
    assert cache.lengths == (45,)


@pytest.mark.parametrize("mode", ["greedy", "several", "beams", "lookup"])
def test_generate_with_other_tokens_than_prefill_is_refused(mode, cp):
    asked = Generation("llama", mode, new=4)
    model, ids, cache = prefilled(cp, asked)
    other = ids.clone()
    other[0, 7] += 1
    for _ in range(2):
        with pytest.raises(ValueError, match=r"generate: was given other tokens than .*prefill. ids: token 7 of seq"):
            model.generate(other, past_key_values=cache, **asked.arguments())
    cache.batch_select_indices([0])
    got = model.generate(ids, past_key_values=cache, **GREEDY.arguments()).sequences
    assert torch.equal(got, GREEDY.model("eager").generate(ids, **GREEDY.arguments()).sequences)


def test_what_was_cropped_may_be_another_prompts(cp):
    model, ids, cache = prefilled(cp)
    other = ids.clone()
    other[0, 30] += 1
    cache.crop(-10)
    got = model.generate(other, past_key_values=cache, **GREEDY.arguments()).sequences
    expected = GREEDY.model("eager").generate(other, **GREEDY.arguments()).sequences
    assert torch.equal(got, expected)
    longer = torch.cat([got, ids[:, :9]], 1)
    cache.prefill(model, longer)
    assert cache.lengths == (longer.shape[1] - 1,)


def test_a_long_prompt_that_was_not_prefilled_is_refused(cp):
    model, ids = GREEDY.model("distflash"), torch.ones(1, 65, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"input_ids: 65 tokens .* expected at most 64. Call cache.prefill\(model, input_"
    ):
        model.generate(ids, past_key_values=tf.ShardedCache(cp), **GREEDY.arguments())


def test_padding_that_was_not_prefilled_so_is_refused(cp):
    asked = Generation("llama", lengths=(9, 12), new=4)
    model, (ids, padding) = asked.model("distflash"), asked.inputs()
    cache = tf.ShardedCache(cp)
    cache.prefill(model, ids)  # without the attention_mask
    with pytest.raises(ValueError, match=r"position_ids: .* the same attention_mask if prompts are padded"):
        model.generate(ids, attention_mask=padding, past_key_values=cache, **asked.arguments())
    with pytest.raises(ValueError, match=r"attention_mask: prompts were padded by \(\) before, and now by \(3, 0\)"):
        cache.prefill(model, torch.cat([ids, ids], 1), None, torch.cat([padding, torch.ones_like(padding)], 1))
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(ids, attention_mask=padding, past_key_values=tf.ShardedCache(cp), **asked.arguments())


def test_batches_of_another_size_are_refused(cp):
    asked = Generation("llama", lengths=(9, 9))
    model, ids, cache = prefilled(cp, asked)
    with pytest.raises(
        ValueError, match="input_ids: 3 sequences, and the ShardedCache has 2; expected as many, or a mul"
    ):
        model.generate(ids[[0, 1, 1]], past_key_values=cache, **asked.arguments())


# An offloaded one, which needs a GPU, is a dynamic one.
@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized", "own", "own static"])
def test_other_caches_are_refused_with_the_name_of_ours(kind, cp):
    model, ids = GREEDY.model("distflash"), GREEDY.inputs()[0]
    arguments = {
        "own": {"past_key_values": DynamicCache()},
        "own static": {"past_key_values": StaticCache(model.config, max_cache_len=64)},
    }.get(kind, {"cache_implementation": kind})
    if kind == "quantized":
        arguments["cache_config"] = {"backend": "fp8"}
    with pytest.raises(
        ValueError, match=r"a KV cache is not supported, except .*ShardedCache|no other cache than a Shar"
    ):
        model.generate(ids, **arguments, max_new_tokens=3)


def test_a_cache_of_ours_beside_one_of_the_library_is_refused(cp):
    model, ids, cache = prefilled(cp)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, past_key_values=cache, cache_implementation="static", max_new_tokens=3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_is_refused(attention, cp):
    model, ids = Case("llama").model(attention), GREEDY.inputs()[0]
    with pytest.raises(ValueError, match=r"its attention was not distflash's.*after register\(cp\)"):
        model.generate(ids, past_key_values=tf.ShardedCache(cp), max_new_tokens=3)


def test_padding_is_refused_where_queries_are_scaled_by_it(cp):
    with pytest.raises(ValueError, match=r"attention_mask: this model scales queries by their position"):
        prefilled(cp, Generation("llama4", lengths=(9, 12)))


def rope_model(kind):
    pairs = 4 if kind == "phi3" else 8  # half a head's dims
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * pairs, "long_factor": [3.0] * pairs}
    rope = long | {"original_max_position_embeddings": 40} if kind != "dynamic" else {"rope_type": kind, "factor": 2.0}
    shared = {**SMALL, "max_position_embeddings": 160 if kind != "dynamic" else 40}
    torch.manual_seed(0)
    if kind == "phi3":
        del shared["head_dim"]
        config = Phi3Config(**shared, rope_parameters=rope, original_max_position_embeddings=40)
        return Phi3ForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(**shared, rope_parameters={**rope, "rope_theta": 1e4})).eval()


@pytest.mark.parametrize("kind", ["phi3", "longrope", "dynamic"])
def test_rope_that_changes_on_the_way_is_refused(kind, cp):
    ids = torch.randint(1, 48, (1, 60), generator=torch.Generator().manual_seed(1))
    arguments = dict(do_sample=False, pad_token_id=PAD, eos_token_id=None)
    model = rope_model(kind)
    cases = [(n, n + 10) for n in (20, 50)]
    expected = {n: model.generate(ids[:, :n], max_length=stop, **arguments) for n, stop in cases}
    model.set_attn_implementation("distflash")
    for n, stop in cases:
        if n == 50 and kind == "dynamic":
            continue
        cache = tf.ShardedCache(cp)
        cache.prefill(model, ids[:, :n])
        assert torch.equal(model.generate(ids[:, :n], past_key_values=cache, max_length=stop, **arguments), expected[n])
    words = r"Phi-3 does where its RoPE|rope_type: '(longrope|dynamic)'"
    cache = tf.ShardedCache(cp)
    cache.prefill(model, ids[:, :38])
    with pytest.raises(ValueError, match=words):
        model.generate(ids[:, :38], past_key_values=cache, max_length=45, **arguments)
    with pytest.raises(ValueError, match=words):
        tf.ShardedCache(cp).prefill(model, ids, chunk=30)


def test_the_clock_of_one_rank_may_stop_it(cp):
    model, ids, cache = prefilled(cp)
    out = model.generate(ids, past_key_values=cache, max_time=1e-9, max_new_tokens=5)
    assert out.shape == (1, 38)
    cache.crop(-1)
    out = model.generate(ids, past_key_values=cache, stopping_criteria=[MaxTimeCriteria(1e-9)], max_new_tokens=5)
    assert out.shape == (1, 38)


def test_unregister_takes_the_hooks_of_models_back(cp):
    model, *_ = prefilled(cp)
    assert model._forward_pre_hooks
    tf.unregister()
    assert not model._forward_pre_hooks
