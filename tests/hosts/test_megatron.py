"""Megatron's GPT over real ranks: losses and gradient norms equal those of its own attention on one process."""

from importlib.util import find_spec

import pytest

from tests.hosts.runs import MegatronRun, call

pytestmark = [
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed: bash .ci/hosts"),
    pytest.mark.timeout(300),
]
PRELOAD = "tests.hosts.megatron_runs"

RUNS = {
    "causal": {},
    "window and learned sinks": {"options": (("window_size", (5, 0)), ("softmax_type", "learnable"))},
    "off by one": {"options": (("softmax_type", "off-by-one"), ("apply_query_key_layer_scaling", True))},
    "packed": {"documents": (8, 16, 4)},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_on_one_process(name, ranks_of):
    (exact,) = ranks_of(1).run(call, PRELOAD, "train", MegatronRun(**RUNS[name]), False)
    for found in ranks_of(2).run(call, PRELOAD, "train", MegatronRun(context=2, **RUNS[name]), True):
        for what, values in exact.items():
            assert found[what] == pytest.approx(values, rel=1e-5), what


DROPOUT = ("attention_dropout", 0.2)
RECOMPUTED = {
    "core attention": (("recompute_granularity", "selective"), ("recompute_modules", ["core_attn"])),
    "layers": (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1)),
}


def trained(ranks_of, context, *options, documents=()):
    """Losses and gradient norms of every rank."""
    run = MegatronRun(context=context, documents=documents, options=options)
    return ranks_of(context).run(call, PRELOAD, "train", run, True)


@pytest.mark.parametrize("documents", [(), (8, 16, 4)], ids=["batch", "packed"])
def test_attention_dropout_is_the_same_on_any_number_of_context_ranks(ranks_of, documents):
    (alone,) = trained(ranks_of, 1, DROPOUT, documents=documents)
    (without,) = trained(ranks_of, 1, documents=documents)
    assert all(abs(a - b) > 1e-4 * b for a, b in zip(alone["grad_norm"], without["grad_norm"], strict=True))
    for found in trained(ranks_of, 2, DROPOUT, documents=documents):
        for what, values in alone.items():
            assert found[what] == pytest.approx(values, rel=1e-5), what


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_activations_have_the_same_dropout(ranks_of, name):
    for kept, found in zip(
        trained(ranks_of, 2, DROPOUT), trained(ranks_of, 2, DROPOUT, *RECOMPUTED[name]), strict=True
    ):
        for what, values in kept.items():
            assert found[what] == pytest.approx(values, rel=1e-6), what


def test_seeds_are_drawn_from_the_random_state_of_the_tensor_parallel_rank(ranks_of):
    found = ranks_of(1).run(call, PRELOAD, "seeds")[0]
    assert found["0"] == found["0 again"] and len(set(found["0"] + found["1"])) == 4
    assert found["already forked"]


def ask(ranks_of, function, *args):
    return ranks_of(1).run(call, "tests.hosts.megatron_refusals", function, *args)[0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            "of_layers",
            {
                "ranks": "context_parallel_size: is 2",
                "layout": "Zigzag()",
                "cross": 'expected "self"',
                "comm": "schedule",
                "logits": "turn both off",
            },
        ),
        (
            "of_calls",
            {
                "bias": "attention_bias",
                "mask": "packed_seq_params",
                "kind": "attn_mask_type",
                "cache": "1 and 4 tokens",
            },
        ),
        (
            "of_packed",
            {"format": '"thd"', "group": "hybrid", "keys": "other boundaries", "lengths": "a multiple of twice"},
        ),
    ],
)
def test_what_is_refused(function, words, ranks_of):
    found = ask(ranks_of, function)
    assert found.pop("nothing") is None
    assert found.keys() == words.keys()
    for name, problem in found.items():
        assert words[name] in (problem or ""), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_document_is_in_a_zigzag_of_its_own(world_size, ranks_of):
    lengths = [2 * world_size * n for n in (1, 3, 2)]
    assert ask(ranks_of, "layout_agrees", lengths, world_size)
