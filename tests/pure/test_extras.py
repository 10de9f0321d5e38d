"""The error for a missing package names the extra that installs it."""

import subprocess
import sys
from configparser import ConfigParser

import pytest

from distflash.extras import needed
from tests.jobs import ROOT

pytestmark = pytest.mark.pure

# Stands for packages that are not installed: Python does not look further for a name that is None.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({packages})); {statement}"
CASES = [
    ("transformers", "import distflash.integrations.transformers", "transformers"),
    ("deepspeed", "import distflash.integrations.deepspeed", "deepspeed"),
    ("torchtitan", "import distflash.integrations.torchtitan", "torchtitan"),
    ("megatron", "import distflash.integrations.megatron", "megatron"),
    ("accelerate", "import distflash.integrations.transformers as dft; dft.Trainer", "trainer"),
    ("trl", "import distflash.integrations.transformers as dft; dft.SFTTrainer", "trainer"),
]


@pytest.mark.parametrize(("package", "statement", "extra"), CASES)
def test_the_extra_is_named(package, statement, extra):
    if package in ("accelerate", "trl"):
        pytest.importorskip("transformers")
    # torchtitan's modules import spmd_types as well, whose place in the order of imports is not ours.
    packages = (package, "spmd_types") if package == "torchtitan" else (package,)
    code = WITHOUT.format(packages=packages, statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    words = [
        f'ImportError: distflash: the package {x} is not installed; pip install "distflash[{extra}]"' for x in packages
    ]
    assert any(each in done.stderr for each in words)


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
