"""The examples of public names run, and print what the docstrings show, on rank 0 of two."""

import doctest
import inspect
import io
import types
from operator import attrgetter

import pytest
import torch
import torch.distributed as dist

import distflash as df

METHODS = [
    f"ContextParallel.{name}"
    for name, member in vars(df.ContextParallel).items()
    if inspect.isfunction(member) and not name.startswith("_") and name != "recipe"
]
NAMES = [name for name in df.__all__ if not isinstance(getattr(df, name), types.ModuleType)]
NAMES += [f"nn.{name}" for name in df.nn.__all__]
NAMES += ["kernels.Hopper", "kernels.Reference", "kernels.Triton", "transport.Simulator", *METHODS]


class _OnFirstRank(doctest.OutputChecker):
    """Other ranks hold other tokens, and print others."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return dist.get_rank() > 0 or super().check_output(want, got, optionflags)


def run_example(name: str) -> str:
    """Run it as this rank; what differs from the docstring."""
    torch.manual_seed(dist.get_rank())
    names = {"torch": torch, "dist": dist, "df": df}
    text = inspect.getdoc(attrgetter(name)(df))
    example = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    assert example.examples, f"{name} has no example"
    said = io.StringIO()
    doctest.DocTestRunner(_OnFirstRank(), optionflags=doctest.ELLIPSIS).run(example, out=said.write)
    return said.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_the_example_prints_what_it_says(name, ranks_of):
    assert "".join(ranks_of(2).run(run_example, name)) == ""
