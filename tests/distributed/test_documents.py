"""README and docs: every block of Python runs, or says why not; what starts with torchrun has its place and ranks.

What a page's blocks have to give is tested beside the subject (`test_readme`, `test_inference_docs`,
`test_verification`); here they run.
"""

import re
import subprocess
import sys
from functools import cache

import pytest

from tests import documents, forked
from tests.documents import PAGES, ROOT

# Pages whose blocks run in a test of their own, with small numbers and results.
ELSEWHERE = ("docs/inference.md",)
SCRIPTS_ELSEWHERE = ("README.md", "docs/verify.md")
# Programs that take no options of ours, or are no programs of the repository.
FOREIGN = ("pip", "source", "cat", "pre-commit", "bash", "accelerate")
FOREIGN_MODULES = ("torchtitan",)

NAMES = {page.relative_to(ROOT).as_posix(): page for page in PAGES}
RUN = [name for name, page in NAMES.items() if name not in ELSEWHERE and documents.python(page)]
SCRIPTS = [
    (name, block.line, block.ranks)
    for name, page in NAMES.items()
    if name not in SCRIPTS_ELSEWHERE
    for block in documents.blocks(page)
    if block.ranks is not None
]
COMMANDS = sorted({tuple(command) for page in PAGES for command in documents.commands(page)})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUN)
def test_the_blocks_of_a_page_run_on_two_ranks(name, ranks_of):
    ranks_of(2).run(documents.run, NAMES[name])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "line", "ranks"), SCRIPTS)
def test_a_script_of_a_page_runs_on_its_ranks(name, line, ranks, tmp_path, request):
    if not request.config.getoption("--full"):
        ranks = 2
    block = next(block for block in documents.blocks(NAMES[name]) if block.line == line)
    script = tmp_path / "this_file.py"
    script.write_text(block.code)
    losses = re.findall(r"rank \d+, step \d: loss (\d+\.\d+)", forked.finish(ranks, script, timeout=250))
    assert len(losses) == 3 * ranks and len(set(losses)) == 3  # the same on every rank


def test_a_block_that_is_not_run_says_why():
    reasons = [block.reason for page in PAGES for block in documents.blocks(page) if block.reason is not None]
    assert all(len(reason.split()) >= 3 for reason in reasons)


@pytest.mark.timeout(300)
def test_every_command_names_a_program_that_is_there_and_its_options():
    """In one process of its own, since each program loads torch."""
    subprocess.run([sys.executable, "-c", f"import {__name__} as here; here.check_commands()"], check=True, cwd=ROOT)


def check_commands() -> None:
    helps = cache(documents.help_of)
    checked = 0
    for command in COMMANDS:
        if command[0] in FOREIGN:
            assert command[0] != "bash" or (ROOT / command[1]).is_file(), command
            continue
        assert command[0] in ("torchrun", "python", "distflash"), command
        program, options = _program(command)
        if program[-1].partition(".")[0] in FOREIGN_MODULES:
            continue
        for option in options:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helps(*program)), (command, option)
            checked += 1
    assert checked > 20


def _program(command: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """How Python is told of the program, and the names of the options that it is given."""
    if command[0] == "distflash":
        command = ("python", "-m", "distflash", *command[1:])
    at = next(n for n, word in enumerate(command) if word == "-m" or word.endswith(".py"))
    stop = at + (2 if command[at] == "-m" else 1)
    program = command[at:stop]
    if program == ("-m", "distflash") and stop < len(command) and not command[stop].startswith("-"):
        program, stop = (*program, command[stop]), stop + 1
    return program, [word.partition("=")[0] for word in command[stop:] if word.startswith("--")]
