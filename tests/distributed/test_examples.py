"""The scripts of examples/ on two CPU processes: their losses are those of the same script on one."""

import contextlib
import io
import re
import runpy
import sys

import pytest

from tests.jobs import ROOT, finish, start, torchrun
from tests.trainer_runs import process_of_ranks

LOSS = re.compile(r"\bloss'?:? '?([\d.]+)")
# With their options, and how much losses of four or five digits may differ: rounding to bfloat16, or to digits.
EXAMPLES = {"accelerate_loop": (("--steps", "8"), 1e-4), "lora_fsdp2": (("--steps", "10"), 2e-3)}
MORE_EXAMPLES = {"trainer": (("--steps", "10"), 1e-3), "sft_packed": ((), 1e-3)}


def losses(output):
    found = [float(x) for x in LOSS.findall(output)]
    assert len(found) >= 2, output
    return found


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
def test_losses_of_the_examples_are_those_of_one_process(request, monkeypatch):
    chosen = EXAMPLES | MORE_EXAMPLES if request.config.getoption("--full") else EXAMPLES
    for name, (options, limit) in chosen.items():
        script = ROOT / "examples" / f"{name}.py"
        job = start(*torchrun(2), script, *options)
        if name in EXAMPLES:
            exact = losses(alone(script, options, monkeypatch))
        else:  # which want torchrun
            exact = losses(finish(start(*torchrun(1), script, *options), timeout=250))
        over = losses(finish(job, timeout=250))
        assert len(over) == len(exact), (name, over, exact)
        assert max(abs(a / b - 1) for a, b in zip(over, exact, strict=True)) <= limit, (name, over, exact)
