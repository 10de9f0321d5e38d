"""Parallel compilation by several processes, some of which fail or hang."""

import threading
import time
from types import SimpleNamespace

import pytest

from distflash.kernels.machine import MACHINES
from distflash.kernels.triton.compiling import Share, Workers, read_compiler_early

MACHINE = MACHINES["sm_90"]


def kernels(count):
    return [dict(key=f"key {n}", fn=SimpleNamespace(name=f"kernel {n}"), repr="") for n in range(count)]


def test_every_specialisation_is_compiled_by_one_process(tmp_path):
    shares = [Share(n, 3, tmp_path) for n in range(3)]
    for _ in range(2):  # one that was skipped is asked about again at every launch
        for kernel in kernels(7):
            takers = [share for share in shares if not share.skips(**kernel)]
            assert len(takers) == 1
            takers[0].done()
    compiled = [set(share.compiled) for share in shares]
    assert [len(names) for names in compiled] == [3, 2, 2] and len(set().union(*compiled)) == 7


def test_two_jobs_do_not_compile_the_same_at_the_same_time(tmp_path):
    one, other = Share(0, 1, tmp_path), Share(0, 1, tmp_path)
    first, second = kernels(2)
    assert not one.skips(**first) and not other.skips(**second)  # of another specialisation nobody waits
    other.done()
    waited = threading.Thread(target=other.skips, kwargs=first)
    waited.start()
    waited.join(0.3)
    assert waited.is_alive()
    one.done()
    waited.join(10)
    assert not waited.is_alive()
    other.done()


def test_without_locks_everybody_compiles(tmp_path):
    (tmp_path / "file").touch()
    share = Share(0, 1, tmp_path / "file")  # no folder can be made there
    assert not share.skips(**kernels(1)[0])
    share.done()


def finished(work, seconds=60.0, processes=2):
    workers = Workers(work, MACHINE, processes)
    done = workers.wait(seconds)
    return done, workers.finish()


def test_the_compiler_is_read_once_and_in_a_thread(monkeypatch):
    read, thread = [], threading.current_thread()
    monkeypatch.setattr("triton.runtime.cache.triton_key", lambda: read.append(threading.current_thread()))
    read_compiler_early.cache_clear()
    try:
        for _ in range(2):
            read_compiler_early().join(10)
    finally:
        read_compiler_early.cache_clear()
    assert len(read) == 1 and read[0] is not thread


def test_processes_run_the_work():
    done, outcome = finished(lambda: None)
    assert done and outcome.compiled == () and outcome.errors == ()


def test_what_a_process_raises_is_said():
    def work():
        raise RuntimeError("no such thing")

    done, outcome = finished(work)
    assert done and outcome.errors == ("RuntimeError: no such thing",) * 2


def test_a_process_that_dies_is_said():
    def work():
        import os

        os._exit(3)

    done, outcome = finished(work)
    assert done and outcome.errors == ("a process ended early",) * 2


@pytest.mark.timeout(60)
def test_a_process_that_hangs_is_ended():
    began = time.monotonic()
    done, outcome = finished(lambda: time.sleep(1000), seconds=0.5, processes=1)
    assert not done and outcome.errors == ("a process ended early",) and time.monotonic() - began < 50
