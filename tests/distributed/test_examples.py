"""The scripts of examples/ on CPU processes: losses of all steps equal those on one process."""

import contextlib
import io
import re
import runpy
import sys
from dataclasses import dataclass

import pytest
import torch

import distflash as df
from tests import forked
from tests.jobs import ROOT
from tests.trainer_runs import process_of_ranks

PRELOAD = "distflash.integrations.transformers.sft"
LOSS = re.compile(r"\bloss'?:? '?([\d.]+)")
FOLDER = ROOT / "examples"


@dataclass(frozen=True)
class Example:
    """A script that trains with SGD and clips nothing, so that gradients off by a factor show in the next step's loss.

    ranks: over how many its losses are compared. full: the options of a run that takes longer.
    """

    name: str
    ranks: int = 2
    options: tuple[str, ...] = ()
    full: tuple[str, ...] = ()


# The losses of float32 runs are printed with six decimals. Sums over ranks are ordered otherwise than on one process,
# which changes the last of them at most by a few units: 3e-7 was measured.
LIMIT = 2e-6
EXAMPLES = [
    Example("minimal"),
    Example("llama_ddp"),
    Example("llama_fsdp2", ranks=4),  # data 2 x context 2
    Example("deepspeed_zero3"),
    Example("deepspeed_pipeline", ranks=4),  # pipe 2 x context 2
    Example("tree_mask"),
    Example("prefill_and_decode"),
    Example("compile", options=("--backend", "eager"), full=("--backend", "inductor")),
]

# With their options, and how much losses of four or five digits may differ: rounding to bfloat16, or to digits.
TRAINERS = {"accelerate_loop": (("--steps", "8"), 1e-4), "lora_fsdp2": (("--steps", "10"), 2e-3)}
MORE_TRAINERS = {"trainer": (("--steps", "10"), 1e-3), "sft_packed": ((), 1e-3)}
# In tests/hosts.
ELSEWHERE = {"lightning_module", "torchtitan_llama"}


def printed(name, ranks, options=(), timeout=250):
    return forked.finish(ranks, FOLDER / f"{name}.py", *options, timeout=timeout)


def losses(output):
    found = [float(x) for x in LOSS.findall(output)]
    assert len(found) >= 2, output
    return found


def assert_equal(over, exact, limit, name):
    assert len(over) == len(exact), (name, over, exact)
    assert max(abs(a / b - 1) for a, b in zip(over, exact, strict=True)) <= limit, (name, over, exact)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_losses_over_ranks_are_those_of_one_process(example, request):
    if example.name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    options = example.full if example.full and request.config.getoption("--full") else example.options
    exact = losses(printed(example.name, 1, options, timeout=250))
    over = losses(printed(example.name, example.ranks, options, timeout=250))
    assert len(set(exact)) > len(exact) // 2  # training moves them
    assert_equal(over, exact, LIMIT, example.name)


def alone(script, options, monkeypatch):
    """What the script prints in this process."""
    from distflash.integrations import transformers as dft

    monkeypatch.setattr(sys, "argv", [str(script), *options])
    screen = io.StringIO()
    with process_of_ranks(), contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            dft.unregister()
    return screen.getvalue()


@pytest.mark.timeout(900)
def test_losses_of_trainers_are_those_of_one_process(request, monkeypatch):
    chosen = TRAINERS | MORE_TRAINERS if request.config.getoption("--full") else TRAINERS
    for name, (options, limit) in chosen.items():
        script = FOLDER / f"{name}.py"
        if name in TRAINERS:
            exact = losses(alone(script, options, monkeypatch))
        else:  # which want torchrun
            exact = losses(forked.finish(1, script, *options, timeout=300))
        assert_equal(losses(forked.finish(2, script, *options, timeout=300)), exact, limit, name)


@pytest.mark.timeout(600)
def test_generated_text_is_that_of_one_process(request):
    if not request.config.getoption("--full"):
        pytest.skip("the same is tested without the script in test_transformers_generate; --full")
    alone, over = (printed("generate_transformers", ranks).splitlines() for ranks in (1, 2))
    assert len(alone) == 3 and alone[:2] == over[:2]  # two turns; the third line tells the bytes on a rank


def test_rollouts_that_share_a_prompt_are_as_each_behind_a_prompt_of_its_own():
    names = {}
    text = (FOLDER / "tree_mask.py").read_text()
    exec(text[: text.index("device = ")], names)  # its classes
    mask, model = names["SharedPrompt"](5, 3), names["Decoder"](df.ContextParallel(df.transport.Alone())).double()
    i, tokens = torch.arange(14), torch.randint(256, (1, 14))
    tree = df.Tree(parents=[-1, 0, 0, 0], lengths=[5, 3, 3, 3])
    assert torch.equal(mask.materialize(i, i), tree.materialize(i, i))
    out = model(tokens, torch.where(i < 5, i, 5 + (i - 5) % 3), mask, 14)
    for first in (5, 8, 11):
        own = torch.cat([tokens[:, :5], tokens[:, first : first + 3]], 1)
        expected = model(own, torch.arange(8), df.Causal(), 8)[:, 5:]
        # The same sums in another order, in float64.
        error = (out[:, first : first + 3] - expected).norm()
        assert error <= 16 * torch.finfo(torch.float64).eps * expected.norm()


def test_every_example_is_tested_short_and_in_the_table():
    tested = {example.name for example in EXAMPLES} | TRAINERS.keys() | MORE_TRAINERS.keys()
    tested |= ELSEWHERE | {"generate_transformers"}
    scripts = {script.stem: script.read_text() for script in FOLDER.glob("*.py")}
    assert scripts.keys() == tested
    table = (FOLDER / "README.md").read_text()
    for name, text in scripts.items():
        assert len(text.splitlines()) < 80, name
        assert "torchrun --nproc-per-node" in text.split('"""')[1], name
        assert f"]({name}.py)" in table, name


def test_the_diff_of_the_documentation_leads_to_the_example():
    page = (ROOT / "docs" / "own_model.md").read_text()
    diff = re.search(r"```diff\n(.*?)```", page, re.DOTALL)[1].splitlines()
    lines = iter((FOLDER / "llama_ddp.py").read_text().splitlines())
    after = [line[1:] for line in diff if line and line[0] in "+ "]
    assert [line for line in after if line not in lines] == []  # each after the one before
    assert sum(line.startswith("+") for line in diff) == 10


def test_the_llama_is_the_same_in_every_file():
    """It stands in each, so that each can be copied."""
    scripts = [(FOLDER / f"llama_{name}.py").read_text() for name in ("ddp", "fsdp2")]
    models = [re.search(r"class Block.*?(?=\n\n\n[#d])", script, re.DOTALL)[0] for script in scripts]
    assert models[0] == models[1]
