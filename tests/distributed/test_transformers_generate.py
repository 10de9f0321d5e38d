"""`generate` over real ranks with different seeds: tokens and scores equal those of one process."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from transformers import StoppingCriteria

import distflash as df
from tests.generation import MODES, Generation, on_one_process, over_ranks
from tests.tiny_models import CONFIGS, relative

PRELOAD = "tests.tiny_models"
# The window of the tiny models is 6 tokens: shorter than prompts and chunks, and passed again and again.
SOME = (
    *((2, Generation(family, lengths=(100,), chunk=33, new=24)) for family in (*CONFIGS, "llama4")),
    *((2, Generation("llama", mode, new=24)) for mode in MODES if mode != "greedy"),
    (2, Generation("mistral", "assisted", (160,), chunk=150, new=24)),
    (2, Generation("gpt_oss", "lookup", (50,), chunk=20, new=24)),
    (2, Generation("gemma2", "sampling", (50, 37, 93), chunk=40, new=24, ends=(5, 9, 11))),
    (2, Generation("llama", "sampling", more=(("streamer", True),), new=16)),
    (2, Generation("llama", "sampling", (37, 20), more=(("stop_strings", ("bc", "ab", "xz", "hi", "e")),))),
    (3, Generation("llama", lengths=(37,), new=24)),
    (3, Generation("mistral", "beams", (50, 37, 93), chunk=40, new=24)),
    (3, Generation("qwen3", "several", (41,), new=24)),
    (3, Generation("llama4", "lookup", (61,), chunk=25, new=24)),
    (3, Generation("gpt_oss", "greedy", (700,), chunk=256, new=16)),
)
PROMPTS = (((37,), None), ((700,), 256), ((50, 37, 93), 40))


def all_of_them():
    """Every family in every mode; but for batches where the library refuses them, and what is refused here."""
    for world_size, family, mode, (lengths, chunk) in product((2, 3), (*CONFIGS, "llama4"), MODES, PROMPTS):
        alone = "assisted" in mode or "lookup" in mode or family == "llama4"
        # Sums of many steps' logarithms, and draws from them: a rounding decides sooner or later.
        new = 16 if mode == "beams, sampling" else 64
        if not (alone and len(lengths) > 1):
            yield world_size, Generation(family, mode, lengths, chunk, new)


def pytest_generate_tests(metafunc):
    if {"world_size", "asked"} <= set(metafunc.fixturenames):
        chosen = [*SOME, *all_of_them()] if metafunc.config.getoption("--full") else SOME
        ids = [f"{asked.family}, {asked.mode}, {asked.lengths}, {world_size} ranks" for world_size, asked in chosen]
        metafunc.parametrize("world_size, asked", chosen, ids=ids)


def integration():
    """Loaded by the ranks only, and when they need it: it takes seconds."""
    from distflash.integrations import transformers

    return transformers


def registered(work, *args):
    """Runs as a rank: ``work`` with a group that is registered."""
    tf = integration()
    cp = df.ContextParallel(dist.group.WORLD)
    tf.register(cp)
    try:
        return work(cp, *args)
    finally:
        tf.unregister()


def generate(cp, asked):
    return over_ranks(asked, cp)


@pytest.mark.timeout(240)
def test_generate_is_that_of_one_process(world_size, asked, ranks_of):
    expected = on_one_process(asked)
    for got in ranks_of(world_size).run(registered, generate, asked):
        require_same(got, expected)


def require_same(got, expected):
    assert torch.equal(got.tokens, expected.tokens)
    assert got.streamed == expected.streamed
    finite = torch.isfinite(expected.scores)
    assert torch.equal(torch.isfinite(got.scores), finite)
    assert relative(got.scores[finite], expected.scores[finite]) <= 1e-5


# Several turns with one cache -----------------------------------------------------------------------------------------

TURNS = (37, 70, 3, 1)  # how many tokens the user adds in each


def turns(asked):
    """The user's tokens, the same for every sequence."""
    generator = torch.Generator().manual_seed(7)
    ids, padding = asked.inputs()
    return ids, padding, [torch.randint(1, 48, (len(ids), n), generator=generator) for n in TURNS]


def conversation(cp, asked):
    """Runs as a rank."""
    (ids, padding, more), model = turns(asked), asked.model("distflash")
    cache, said = integration().ShardedCache(cp), []
    for new in more:
        ids = torch.cat([ids, new], 1)
        padding = None if padding is None else torch.cat([padding, torch.ones_like(new)], 1)
        cache.prefill(model, ids, asked.chunk, padding)
        out = model.generate(ids, attention_mask=padding, past_key_values=cache, **asked.arguments()).sequences
        said.append(out)
        padding = None if padding is None else torch.cat([padding, torch.ones_like(out[:, ids.shape[1] :])], 1)
        ids = out
    return said


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "asked",
    [Generation("gemma2", "greedy", (40,), 16, new=12), Generation("mistral", "greedy", (30, 37, 21), 20, new=12)],
    ids=lambda asked: asked.family,
)
def test_a_conversation_goes_on_with_one_cache(asked, ranks_of):
    (ids, padding, more), model, expected = turns(asked), asked.model("eager"), []
    for new in more:
        ids = torch.cat([ids, new], 1)
        mask = (
            None
            if padding is None
            else torch.cat([padding, ids.new_ones(len(ids), ids.shape[1] - padding.shape[1])], 1)
        )
        expected.append(model.generate(ids, attention_mask=mask, **asked.arguments()).sequences)
        ids = expected[-1]
    for said in ranks_of(2).run(registered, conversation, asked):
        assert all(map(torch.equal, said, expected))


# What would part the ranks --------------------------------------------------------------------------------------------


def generate_with_rounding(cp, asked):
    """Runs as a rank: other ranks than the first round differently, by so much that they would choose other tokens."""
    tf = integration()
    model, (ids, _) = asked.model("distflash"), asked.inputs()
    if cp.rank:
        model.lm_head.weight.data += 0.05 * torch.randn(model.lm_head.weight.shape)
    cache = tf.ShardedCache(cp)
    cache.prefill(model, ids)
    out = model.generate(ids, past_key_values=cache, **asked.arguments()).sequences
    alone = model.set_attn_implementation("eager") or model.generate(ids, **asked.arguments()).sequences
    return out, alone


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_ranks_whose_logits_differ_choose_the_first_ones_tokens(mode, ranks_of):
    asked = Generation("llama", mode, new=24, ends=(2, 3))
    expected = on_one_process(asked).tokens
    results = ranks_of(2).run(registered, generate_with_rounding, asked)
    assert all(torch.equal(out, expected) for out, _ in results)
    assert not torch.equal(results[1][1], expected)  # it would have chosen others by itself


class AfterSteps(StoppingCriteria):
    """Stops after so many steps, as a clock that goes differently on each rank would."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, input_ids, scores, **_):
        self.steps -= 1
        return torch.full((len(input_ids),), self.steps == 0)


def stop_apart(cp):
    """Runs as a rank: each has a criterion that would stop it at another step."""
    tf, asked = integration(), Generation("llama", new=24)
    model, (ids, _), cache = asked.model("distflash"), asked.inputs(), integration().ShardedCache(cp)
    cache.prefill(model, ids)
    stops = [tf.DecidedByOneRank(AfterSteps(5 + 3 * cp.rank), cp)]
    return model.generate(ids, past_key_values=cache, stopping_criteria=stops, **asked.arguments()).sequences


def test_ranks_whose_criteria_differ_stop_where_the_first_does(ranks_of):
    expected = on_one_process(Generation("llama", new=24)).tokens[:, : 37 + 5]
    assert all(torch.equal(tokens, expected) for tokens in ranks_of(2).run(registered, stop_apart))


def random_states(cp):
    """Runs as a rank."""
    asked = Generation("llama", "sampling", new=3)
    over_ranks(asked, cp)
    return torch.rand(1).item()


def test_the_random_state_is_the_first_ranks(ranks_of):
    first, second = ranks_of(2).run(registered, random_states)
    assert first == second


# Refusals, by all ranks and without waiting for any -------------------------------------------------------------------


def refusals(cp):
    """Runs as a rank: what each of several wrong calls raises, and that the cache is usable afterwards."""
    tf = integration()
    asked = Generation("llama", new=5)
    model, (ids, _), words = asked.model("distflash"), asked.inputs(), {}
    cache = tf.ShardedCache(cp)

    def note(name, call):
        try:
            call()
        except ValueError as error:
            words[name] = str(error)

    other = ids.clone()
    other[0, 3] += cp.rank
    note("tokens", lambda: cache.prefill(model, other))
    note("few tokens", lambda: tf.ShardedCache(cp).prefill(model, other[:, 2:6], chunk=1))
    cache.reset()
    cache.prefill(model, ids)
    note("max_time", lambda: model.generate(ids, past_key_values=cache, max_time=60.0, max_new_tokens=3))
    note("capacity", lambda: over_ranks(asked, cp, capacity=38))
    parted = ids.clone()
    parted[0, -1] = 1 + cp.rank
    another = ids.clone()
    another[0, 3] = 1 + (another[0, 3] + 1) % 40
    note("prompt", lambda: model.generate(another, past_key_values=cache, max_new_tokens=3))
    of_one = another if cp.rank else ids
    note("prompt of one", lambda: model.generate(of_one.clone(), past_key_values=cache, max_new_tokens=3))
    note("last token", lambda: model.generate(parted, past_key_values=cache, max_new_tokens=3))
    return words, model.generate(ids, past_key_values=cache, **asked.arguments()).sequences


def test_wrong_calls_are_refused_by_all_ranks(ranks_of):
    results = ranks_of(2).run(registered, refusals)
    for words, tokens in results:
        assert "input_ids" in words["tokens"] and "same whole batch" in words["tokens"]
        assert "contents" in words["few tokens"]
        assert words["max_time"].startswith("max_time: every rank has a clock of its own")
        assert "expected at most capacity=38" in words["capacity"]
        assert words["prompt"].startswith("generate: was given other tokens than cache.prefill. ids: token 3 of seq")
        assert "prompt of one" in words
        assert "different tokens" in words["last token"]
        assert torch.equal(tokens, on_one_process(Generation("llama", new=5)).tokens)
