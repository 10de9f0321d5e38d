"""torchtitan's trainer over real ranks: losses, gradient norms and validation equal those of one process."""

from importlib.util import find_spec

import pytest
import torch

import distflash as df
from tests.hosts.runs import TitanRun, call

pytestmark = [
    pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed: bash .ci/hosts"),
    pytest.mark.timeout(300),
]
PRELOAD = "tests.hosts.titan_runs"


# Of torchtitan's logged loss under full_dtensor see `titan_runs.logged`.
RUNS = [TitanRun(context=2), TitanRun(context=2, backend="full_dtensor")]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_as_on_one_process(run, ranks_of, tmp_path):
    (exact,) = ranks_of(1).run(call, PRELOAD, "train", TitanRun(batch=run.batch, packed=run.packed), str(tmp_path))
    for found in ranks_of(run.ranks).run(call, PRELOAD, "train", run, str(tmp_path)):
        for name, values in exact.items():
            assert len(values) > 1
            assert found[name] == pytest.approx(values, rel=2e-5), name


def test_the_example_is_as_on_one_process(ranks_of, tmp_path):
    (exact,) = ranks_of(1).run(call, PRELOAD, "train_example", 1, str(tmp_path))
    assert len(set(exact["loss"])) == 4
    for found in ranks_of(2).run(call, PRELOAD, "train_example", 2, str(tmp_path)):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(exact[name], rel=2e-5), name


def ask(ranks_of, function, *args):
    return ranks_of(1).run(call, "tests.hosts.titan_refusals", function, *args)[0]


@pytest.mark.parametrize(
    ("options", "model", "words"),
    [
        ((), "windows by masks", 'attn_backend="varlen"'),
        ((), "with images", "train on text"),
        ((("parallelism.context_parallel_load_balancer", "ptrr"),), "llama", "Contiguous"),
        ((("training.disable_cuda_graphs", False),), "llama", "--training.disable_cuda_graphs"),
        (
            (("parallelism.spmd_backend", "full_dtensor"), ("parallelism.tensor_parallel_degree", 2)),
            "llama",
            "partial_dtensor",
        ),
        (
            (
                ("parallelism.spmd_backend", "spmd_types"),
                ("debug.spmd_typechecking", True),
                ("activation_checkpoint", None),
            ),
            "llama",
            "a run without context ranks",
        ),
    ],
)
def test_what_a_configuration_is_refused_for(options, model, words, ranks_of):
    assert words in ask(ranks_of, "of_configuration", options, model)


def test_the_default_backend_needs_a_torch_that_reads_its_types(ranks_of):
    problem = ask(ranks_of, "of_configuration", (("parallelism.spmd_backend", "spmd_types"),))
    assert (problem is None) == hasattr(torch.distributed, "_is_spmd_types_available")
    assert problem is None or "torch 2.14" in problem


def test_other_refusals(ranks_of):
    assert ask(ranks_of, "of_configuration", (), "windows by layer") is None
    assert "layers[1]" in ask(ranks_of, "of_another_layer")
    assert "derive from" in ask(ranks_of, "of_another_trainer")
    assert "context_parallel(config)" in ask(ranks_of, "of_torchtitans_masks")
    assert "score_mod" in ask(ranks_of, "of_score_mod")
    assert "sequence 1 has 1 and then 5" in ask(ranks_of, "of_positions")


def test_documents_begin_where_positions_are_zero(ranks_of):
    assert ask(ranks_of, "documents", [[0, 1, 2, 3], [0, 1, 2, 3]]) is None
    assert ask(ranks_of, "documents", [[0, 1, 0, 1], [0, 1, 0, 1]]) == df.Documents([0, 2, 4])
    rows = df.Rows([df.Documents([0, 4]), df.Documents([0, 1, 2, 4])])
    assert ask(ranks_of, "documents", [[0, 1, 2, 3], [0, 0, 0, 1]]) == rows


def test_a_layer_has_its_own_window_and_an_epilogue(ranks_of):
    assert ask(ranks_of, "window_and_sinks") < 1e-12
