"""Optional packages: around the imports of one that pip installs with an extra of distflash."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(extra: str, *packages: str) -> Iterator[None]:
    """Around imports: name the extra whose package is missing.

    Args:
        extra: as pip takes it, ``distflash[extra]``.
        packages: the names by which Python imports what the extra installs.

    Raises:
        ImportError: one of the packages is not installed, or lacks a module, as an older release does. Other errors of
            an import are passed on as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        package = missing.partition(".")[0]
        if package not in packages:
            raise
        if sys.modules.get(package) is None:
            raise ImportError(
                f'distflash: the package {package} is not installed; pip install "distflash[{extra}]"'
            ) from error
        raise ImportError(
            f'distflash: the installed {package} has no module {missing}; pip install --upgrade "distflash[{extra}]"'
        ) from error
