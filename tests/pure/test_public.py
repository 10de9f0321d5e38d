"""The public names: types, and lazy loading in any order."""

import subprocess
import sys
import types
from importlib.machinery import PathFinder

import pytest

import distflash as df


@pytest.mark.parametrize("name", df.__all__)
def test_no_public_name_but_that_of_a_package_is_a_module_too(name):
    """Otherwise the name would mean the module, once anything has imported it."""
    is_module = PathFinder.find_spec(f"distflash.{name}", df.__path__) is not None
    assert is_module == isinstance(getattr(df, name), types.ModuleType)


def test_the_first_name_that_is_asked_for_is_the_public_one():
    code = "import distflash.nn, distflash as df; assert callable(df.decode), df.decode"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'atention'"):
        _ = df.atention
