"""Scripts on several ranks as torchrun starts them, without loading torch again: by processes that are forked with it.

    output = finish(2, "launch/evaluate.py", "--device", "cpu")

Each process has what torchrun sets for its rank, runs the script as its main program and ends with its exit code. What
looks at the launcher itself is started by `tests.jobs.torchrun`. A shell script that starts torchrun many times is
given a `python` that does the same.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.jobs import ROOT, free_port
from tests.ranks import preload

# Seconds that the other ranks have to end once one has failed.
GRACE = 5.0


def finish(ranks: int, *command: object, expected: int = 0, timeout: float = 150, **env: str) -> str:
    """Run a script, or a module after "-m", and return the output of all ranks. Another exit code fails the test.

    expected: the exit code of the first rank that fails, 0 if none does.
    """
    code, text = run(ranks, [str(word) for word in command], timeout, env)
    if code is None:
        pytest.fail(f"no end after {timeout} s:\n{text}")
    assert code == expected, f"exit code {code} instead of {expected}:\n{text}"
    return text


def run(ranks: int, words: list[str], timeout: float, env: dict[str, str]) -> tuple[int | None, str]:
    """The exit code, None if there was no end in time, and what all ranks printed."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **env}
        code = _wait([_start(rank, ranks, place, words, output.name) for rank in range(ranks)], timeout)
        return code, Path(output.name).read_text(errors="replace")


PYTHON = """#!{executable}
import os, sys
from multiprocessing.connection import Client

if sys.argv[1:5] != ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with Client({socket!r}) as asked:
    asked.send(sys.argv[5:])
    code, text = asked.recv()
print(text, end="")
sys.exit(code)
"""


@contextmanager
def python(folder: Path, timeout: float, **env: str) -> Iterator[Path]:
    """A program that is Python, but for torchrun on one node: it has the ranks forked from here.

    timeout: seconds that each of them may take.
    """
    program, socket = folder / "python", str(folder / "socket")
    program.write_text(PYTHON.format(executable=sys.executable, socket=socket))
    program.chmod(0o755)

    def serve() -> None:
        while words := (asked := listener.accept()).recv():
            code, text = run(int(words[0]), words[1:], timeout, env)
            asked.send((1, f"{text}\nno end after {timeout} s") if code is None else (code, text))

    with Listener(socket) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield program
        with Client(socket) as asked:
            asked.send([])
        thread.join(timeout)


def _start(rank: int, ranks: int, place: dict[str, str], words: list[str], output: str) -> BaseProcess:
    counts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    launcher = {"TORCHELASTIC_RUN_ID": "forked", **{name: str(count) for name, count in counts.items()}}
    preload()
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=({**os.environ, **place, **launcher}, words, output)
    )
    process.start()
    return process


def _run(env: dict[str, str], words: list[str], output: str) -> None:
    """Runs as a rank."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    stream = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    is_module = words[0] == "-m"
    program, sys.argv = words[is_module], words[is_module:]
    sys.path[0] = str(ROOT if is_module else Path(program).resolve().parent)
    if is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


def _wait(processes: Sequence[BaseProcess], timeout: float) -> int | None:
    """The first exit code that is not 0; None if the processes had to be ended. None of them is left."""
    running, code, deadline = {process.sentinel: process for process in processes}, 0, time.monotonic() + timeout
    try:
        while running:
            ended = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ended:
                return code or None
            for sentinel in ended:
                process = running.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                if process.exitcode and not code:
                    code, deadline = process.exitcode, min(deadline, time.monotonic() + GRACE)
        return code
    finally:
        for process in running.values():
            process.kill()
            process.join()
