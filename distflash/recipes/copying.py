"""`distflash copy`: write a job of the package as a script to edit."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from distflash import __version__
from distflash.recipes.catalogue import Recipe
from distflash.recipes.options import Placed

HEAD = """\
# A copy of {module}, distflash {version}, for you to edit.
# It imports other modules of the package: copy those that you change, too.
# torchrun --standalone --nproc-per-node 2 {script} --help
"""
# For jobs whose libraries read environment variables at import.
BEFORE = """
if __name__ == "__main__":  # before the imports below
    from distflash.recipes.{options} import {kind}
    from distflash.recipes.options import parse

    parse({kind}, None).before_main()

"""
TAIL = """

if __name__ == "__main__":
    from distflash.recipes.{options} import {kind}
    from distflash.recipes.options import parse
    from distflash.recipes.process import end_with

    end_with(lambda: main(parse({kind}, None)))
"""


def copy(recipe: Recipe, to: Path | None) -> Path:
    """Write the job's main module as a script, and return its path.

    Args:
        to: a file, or an existing folder; None for a file named after the job in this folder.

    Raises:
        ValueError: the file exists.
    """
    path = Path() if to is None else to
    if path.is_dir():
        path = path / recipe.script
    module, (options, kind) = f"distflash.recipes.{recipe.module}", recipe.options
    source = files("distflash.recipes").joinpath(f"{recipe.module}.py").read_text(encoding="utf-8")
    head = HEAD.format(module=module, version=__version__, script=path.name)
    if recipe.load_options().before_main is not Placed.before_main:
        head += BEFORE.format(options=options, kind=kind)
    try:
        with path.open("x", encoding="utf-8") as script:
            script.write(head + source + TAIL.format(options=options, kind=kind))
    except FileExistsError as error:
        raise ValueError(f"TO: got {path}, which exists; name another file, or remove that one") from error
    except OSError as error:
        raise ValueError(f"TO: got {path}, which cannot be written: {error.strerror}") from error
    return path
