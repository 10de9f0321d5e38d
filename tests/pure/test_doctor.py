"""The doctor's findings, tables and comparisons, and its command line."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import distflash as df
from distflash.__main__ import main
from distflash.doctor import attention
from distflash.doctor.findings import Finding, from_json, merged, plain_table, to_json
from tests.jobs import ROOT


def test_help_loads_no_torch():
    """The parent package included: it is asked for its version, and for nothing else."""
    program = (
        "import sys, distflash.__main__ as cli\n"
        "try: cli.main(['doctor', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    text = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert text.returncode == 0, text.stderr
    assert "--timeout" in text.stdout


def test_without_a_command_it_says_what_there_is(capsys):
    assert main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_equal_findings_are_one_line():
    rate = [Finding("ring", f"{n} GiB/s", amount=float(n)) for n in (1, 3, 2)]
    torches = [Finding("torch", version, same=True) for version in ("2.11", "2.11", "2.12")]
    by_rank = [from_json(to_json(each)) for each in zip(rate, torches, strict=True)]
    lines = [(f.check, f.result, ranks, f.ok) for f, ranks in merged(by_rank)]
    assert lines == [
        ("ring", "3 GiB/s", "all", True),
        ("torch", "2.11", "0, 1", False),
        ("torch", "2.12", "2", False),
    ]


def test_a_plain_table_is_aligned():
    assert plain_table([("check", "ranks"), ("a", "all")]) == ["check  ranks", "a      all"]


class Inexact(df.kernels.Reference):
    """Values that are a thousandth too large."""

    def forward(self, q, keys, *args, **kwargs):
        super().forward(q, tuple(replace(x, v=1.001 * x.v) for x in keys), *args, **kwargs)


@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
def test_a_kernel_is_compared_with_the_definition(dtype):
    right, wrong = (
        attention.judged("", df.ContextParallel(df.transport.Alone(), kernel=kernel), attention.cases(dtype), cpu())
        for kernel in (df.kernels.Reference(), Inexact())
    )
    assert right.ok and 0 < right.amount < 1
    assert dtype != torch.float32 or (not wrong.ok and "wrong results" in wrong.remedy)


def cpu():
    return torch.device("cpu")
