"""The error for a missing package names the extra that installs it."""

import subprocess
import sys
from configparser import ConfigParser

import pytest

from distflash.extras import needed
from tests.jobs import ROOT

pytestmark = pytest.mark.pure

# Each statement in a fork of a process that has loaded torch. None stands for packages that are not installed: Python
# does not look further for such a name.
WITHOUT = """
import os, sys, traceback
import torch, distflash, distflash.kernels, distflash.api

for packages, statement in {cases}:
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    sys.modules.update(dict.fromkeys(packages))
    try:
        exec(statement)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
    else:
        print("no error")
    sys.stdout.flush()
    os._exit(0)
"""
CASES = [
    ("transformers", "import distflash.integrations.transformers", "transformers"),
    ("deepspeed", "import distflash.integrations.deepspeed", "deepspeed"),
    ("torchtitan", "import distflash.integrations.torchtitan", "torchtitan"),
    ("megatron", "import distflash.integrations.megatron", "megatron"),
    ("accelerate", "import distflash.integrations.transformers as dft; dft.Trainer", "trainer"),
    ("trl", "import distflash.integrations.transformers as dft; dft.SFTTrainer", "trainer"),
]


def together(package):
    """torchtitan's modules import spmd_types as well, whose place in the order of imports is not ours."""
    return (package, "spmd_types") if package == "torchtitan" else (package,)


@pytest.fixture(scope="module")
def errors():
    """By package, the error of a statement that needs it, and does not find it."""
    code = WITHOUT.format(cases=[(together(package), statement) for package, statement, _ in CASES])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    return dict(zip([package for package, _, _ in CASES], done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize(("package", "statement", "extra"), CASES)
def test_the_extra_is_named(package, statement, extra, errors):
    if package in ("accelerate", "trl"):
        pytest.importorskip("transformers")
    assert errors[package] in [
        f'ImportError: distflash: the package {each} is not installed; pip install "distflash[{extra}]"'
        for each in together(package)
    ]


def test_every_extra_that_is_named_installs_its_package():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for package, extra in [*((package, extra) for package, _, extra in CASES), ("matplotlib", "plot")]:
        assert package in config["options.extras_require"][extra]


def test_a_module_that_an_older_release_lacks_is_named_with_the_upgrade():
    words = r"the installed json has no module json\.no_such; pip install --upgrade"
    with pytest.raises(ImportError, match=words), needed("transformers", "json"):
        import json.no_such  # noqa: F401


def test_another_error_of_an_import_is_passed_on():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needed("transformers", "transformers"):
        import no_such_module  # noqa: F401
