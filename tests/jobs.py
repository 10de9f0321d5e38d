"""Runs commands as users start them, and stops all their processes if one hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def torchrun_node(node: int, nodes: int, ranks: int, port: int) -> list[str]:
    """The agent of one of several nodes, all of which are this machine. ranks: of each node."""
    options = {"nnodes": nodes, "node-rank": node, "nproc-per-node": ranks}
    options |= {"master-addr": "127.0.0.1", "master-port": port}
    return [sys.executable, "-m", "torch.distributed.run", *(f"--{name}={value}" for name, value in options.items())]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(*command: object, **env: str) -> subprocess.Popen[str]:
    """Start a command in the repository's root, a core a process; its outputs come together."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str], expected: int = 0, timeout: float = 150) -> str:
    """Wait for the job and return its output. A hang or another exit code fails the test."""
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end after {timeout} s:\n{kill(job)}")
    assert job.returncode == expected, f"exit code {job.returncode} instead of {expected}:\n{output}"
    return output


def wait_until(condition: Callable[[], bool], *jobs: subprocess.Popen[str], timeout: float = 150) -> None:
    """Wait for something that the jobs do; if one of them ends first, or time is up, all end and the test fails."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline or any(job.poll() is not None for job in jobs):
            pytest.fail("\n".join(["what was waited for did not come:", *map(kill, jobs)]))
        time.sleep(0.05)


def kill(job: subprocess.Popen[str]) -> str:
    """Kill the job and all its processes, as after a power failure, and return its output."""
    for pid in [job.pid, *descendants(job.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return job.communicate()[0]


def descendants(pid: int) -> Iterator[int]:
    """The processes below this one. torchrun's ranks have sessions of their own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def rank_process(job: subprocess.Popen[str], rank: int) -> int:
    """The process id of one rank among those of the launcher."""
    for child in descendants(job.pid):
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return child
    raise AssertionError(f"the launcher has no rank {rank}")
