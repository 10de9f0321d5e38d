"""The code in README and docs: where it is, and how it is run.

A block of Python runs on two ranks, after the page's blocks before it; `torch`, `dist` and `df` are there. Comments
right before the block, which readers do not see, say what else is to be known:

    <!-- not run: why -->          this block is only compiled
    <!-- prepared by: code -->     what runs before it, in place of the reader's own names

A block that says `torchrun` in its first line is a script of its own, and is started so.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import distflash as df

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PIECE = re.compile(r"^<!-- (not run|prepared by):\s*(.*?)\s*-->$|^( *)```(\w+)\n(.*?)^\3```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of its first line in the page, from 1.
        language: as the fence says.
        code: without indentation.
        before: code that has to run before it.
        reason: why it is not run; None if it is.
    """

    line: int
    language: str
    code: str
    before: str
    reason: str | None

    @property
    def ranks(self) -> int | None:
        """With how many ranks the block is to be started as a script; None if it is none."""
        found = re.search(r"# torchrun --nproc-per-node (\d+)", self.code.partition("\n")[0])
        return None if found is None or self.language != "python" else int(found[1])


def blocks(page: Path) -> Iterator[Block]:
    """The page's blocks, in order."""
    text = page.read_text()
    before, reason = "", None
    for found in PIECE.finditer(text):
        kind, words, pad, language, code = found.groups()
        if kind == "not run":
            reason = words
        elif kind == "prepared by":
            before = words
        else:
            line = text.count("\n", 0, found.start()) + 2
            yield Block(line, language, re.sub(f"^{pad}", "", code, flags=re.MULTILINE), before, reason)
            before, reason = "", None


def python(page: Path) -> list[Block]:
    """The page's blocks of Python that are no scripts."""
    return [block for block in blocks(page) if block.language == "python" and block.ranks is None]


def run(page: Path, prepared: str = "") -> None:
    """Run the page's blocks as this rank.

    Args:
        prepared: what runs before the first one.
    """
    torch.manual_seed(0)  # the same on every rank
    names: dict[str, object] = {"torch": torch, "dist": dist, "df": df, "__name__": page.stem}
    exec(prepared, names)
    for block in python(page):
        lines = "\n" * (block.line - 1)  # so that a traceback has the page's own
        code = compile(lines + block.code, str(page), "exec", dont_inherit=True)
        if block.reason is None:
            exec(block.before, names)
            exec(code, names)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's blocks of bash."""
    for block in blocks(page):
        if block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                yield from _commands(shlex.split(line, comments=True))


def _commands(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line: parts of a pipe, without settings before them and redirections."""
    command: list[str] = []
    for word in [*words, "|"]:
        if word in ("|", "&&", ";"):
            if command:
                yield command
            command = []
        elif not re.match(r"\d?>", word) and (command or not re.match(r"[A-Z_]+=", word)):
            command.append(word)


def help_of(*program: str) -> str:
    """What a program of this repository prints for `--help`.

    The package's own programs end their process, and load no torch for it; the others are run in this process.
    """
    if program[0].startswith("launch/") or program[:2] == ("-m", "distflash"):
        command = [sys.executable, *program, "--help"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    said, before = io.StringIO(), (sys.argv, sys.path[:])
    sys.argv = [*program, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            if program[0] == "-m":
                sys.argv = [*program[1:], "--help"]
                runpy.run_module(program[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(program[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    return said.getvalue()
