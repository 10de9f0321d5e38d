"""What an integration needs beside distflash: packages that an extra brings, and the words for one that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(extra: str, *packages: str) -> Iterator[None]:
    """Around imports: name the extra where one of its packages is not installed.

    Args:
        extra: as pip takes it, ``distflash[extra]``.
        packages: the names by which Python imports them.

    Raises:
        ImportError: one of the packages is missing. Other errors of an import are passed on as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        raise ImportError(
            f"distflash.integrations: the package {package} is not installed; pip install 'distflash[{extra}]'"
        ) from error
