"""The harness for scripts: environment, output and exit code of each rank; no process stays."""

import pytest

from tests import forked
from tests.jobs import finish, start

pytestmark = pytest.mark.timeout(300)

SCRIPT = """
import os, sys, time, torch.distributed as dist
dist.init_process_group("gloo")
print(__name__, dist.get_rank(), os.environ["LOCAL_WORLD_SIZE"], sys.argv[1:], flush=True)
if sys.argv[1] == "fails" and dist.get_rank() == 1:
    sys.exit(3)
if sys.argv[1] != "ends":
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_each_rank_runs_the_script_in_its_place(script):
    lines = forked.finish(2, script, "ends", "here").splitlines()
    assert sorted(lines) == [f"__main__ {rank} 2 ['ends', 'here']" for rank in range(2)]


def test_a_rank_that_fails_ends_the_others(script, monkeypatch):
    monkeypatch.setattr(forked, "GRACE", 0.5)
    assert "__main__ 1 2" in forked.finish(2, script, "fails", expected=3)
    with pytest.raises(AssertionError, match="exit code 3 instead of 0"):
        forked.finish(2, script, "fails")


def test_a_script_that_hangs_fails_with_what_it_printed(script):
    with pytest.raises(pytest.fail.Exception, match=r"no end after 3 s:\n.*__main__ "):
        forked.finish(1, script, "hangs", timeout=3)


def test_a_module_is_run_by_its_name():
    assert "usage" in forked.finish(1, "-m", "json.tool", "--help")


def test_a_python_has_the_ranks_of_torchrun_forked(script, tmp_path):
    with forked.python(tmp_path, timeout=30) as python:
        torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script)
        lines = finish(start(*torchrun, "ends", "here")).splitlines()
        assert sorted(lines) == [f"__main__ {rank} 2 ['ends', 'here']" for rank in range(2)]
        assert "__main__ 1 2" in finish(start(*torchrun, "fails"), expected=3)
        assert finish(start(python, "-c", "print(5)")) == "5\n"
