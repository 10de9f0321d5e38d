"""The releases of triton with which the kernels are compiled and tested."""

from __future__ import annotations

import warnings

# The first and the last. Gluon is private API of triton, whose names change from one release to the next.
FIRST, LAST = (3, 6), (3, 9)
RANGE = "3.6 to 3.9"


def is_tested(version: str) -> bool:
    """Whether ``triton.__version__`` is in the range."""
    return FIRST <= tuple(int(part) for part in version.split(".")[:2]) <= LAST


def gluon_reasons(version: str) -> list[str]:
    """Why kernels in Gluon cannot be compiled by this triton; empty if they can."""
    if is_tested(version):
        return []
    return [
        f"the Hopper kernel is written for triton {RANGE}, and triton {version} is installed; install one of these "
        "releases, if your torch allows it, or use the portable kernel, df.kernels.Triton()"
    ]


def warn_untested(version: str) -> None:
    """Warn that the portable kernel, which uses triton's public API alone, has not been tested with this release."""
    if not is_tested(version):
        warnings.warn(
            f"distflash is tested with triton {RANGE}, and triton {version} is installed. The portable kernel, "
            "df.kernels.Triton(), runs all the same: check its results with df.verify. The Hopper kernel refuses this "
            "release",
            stacklevel=3,
        )
