"""A job from its command line to its exit code: as a command of `distflash`, and as a script that torchrun starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NoReturn, TypeVar

from distflash.recipes.catalogue import BY_NAME, Recipe
from distflash.recipes.options import Placed, parse
from distflash.recipes.process import end_with
from distflash.recipes.ranks import HELP, ranks_to_start, start_ranks

Options = TypeVar("Options", bound=Placed)


@dataclass(frozen=True)
class Launch(Generic[Options]):
    """A job's options and the number of ranks."""

    job: Options
    ranks: int | None = field(default=None, metadata={"help": HELP})

    def __post_init__(self) -> None:
        if self.count > 1:
            self.job.check_ranks(self.count)

    @property
    def count(self) -> int:
        """How many ranks to start; 1: this process is the rank."""
        return ranks_to_start(self.ranks, self.job.device_type)


def run(recipe: Recipe, arguments: Sequence[str]) -> int:
    """`distflash NAME ARGUMENTS`. Options are checked before ranks are started, so that errors come quickly."""

    def job() -> int:
        options = recipe.load_options()
        launch = parse(
            Launch[options],  # type: ignore[valid-type]
            list(arguments),
            prog=f"distflash {recipe.name}",
            description=f"distflash {recipe.name}: {recipe.line}.",
        )
        if launch.count > 1:
            return start_ranks(launch.count, [recipe.name, *arguments])
        return run_here(recipe, launch.job)

    return with_extras(recipe, job)


def script(name: str) -> NoReturn:
    """Run the named job with this process's command line, on the ranks of its launcher."""
    recipe = BY_NAME[name]
    end_with(lambda: with_extras(recipe, lambda: run_here(recipe, parse(recipe.load_options(), None))))


def run_here(recipe: Recipe, options: Placed) -> int:
    """The exit code of the job, with this process as a rank."""
    options.before_main()
    return recipe.load_main()(options)


def with_extras(recipe: Recipe, job: Callable[[], int]) -> int:
    """The exit code of `job`. If a package that it needs is missing, prints a line and returns 2."""
    try:
        recipe.check_extras()
    except ValueError as error:
        print(f"distflash {error}", file=sys.stderr)
        return 2
    return job()
