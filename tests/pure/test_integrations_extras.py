"""A package that is not installed is named together with the extra that brings it."""

import subprocess
import sys

import pytest

from distflash.integrations.extras import needed

# Stands for a package that is not installed: Python does not look further for a name that is None.
WITHOUT = "import sys; sys.modules[{package!r}] = None; {statement}"


@pytest.mark.parametrize(
    ("package", "statement", "extra"),
    [
        ("transformers", "import distflash.integrations.transformers", "transformers"),
        ("deepspeed", "import distflash.integrations.deepspeed", "deepspeed"),
        ("accelerate", "import distflash.integrations.transformers as dft; dft.Trainer", "trainer"),
        ("trl", "import distflash.integrations.transformers as dft; dft.SFTTrainer", "trainer"),
    ],
)
def test_the_extra_is_named(package, statement, extra):
    code = WITHOUT.format(package=package, statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    words = f"ImportError: distflash.integrations: the package {package} is not installed; pip install"
    assert f"{words} 'distflash[{extra}]'" in done.stderr


def test_another_error_of_an_import_is_passed_on():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needed("transformers", "transformers"):
        import no_such_module  # noqa: F401
