"""What setup.cfg cannot say: the description for a package index, and addresses that only a host knows.

REPOSITORY_URL and SITE_URL are set where a release is built. With them the README's links lead to the repository and
the package has addresses; without them links to files are plain text.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools.links import redirected  # noqa: E402

REPOSITORY = os.environ.get("REPOSITORY_URL", "").rstrip("/")
SITE = os.environ.get("SITE_URL", "").rstrip("/")


def target(link: str, picture: bool) -> str | None:
    """Where a link of the README leads; None where there is no repository to lead to."""
    if not REPOSITORY:
        return None
    return f"{REPOSITORY}/{'raw' if picture else 'blob'}/main/{link}"


def addresses() -> dict[str, str]:
    """The addresses that are known, by their names on an index."""
    known = {"Repository": REPOSITORY, "Documentation": SITE}
    if REPOSITORY:
        known |= {"Issues": f"{REPOSITORY}/issues", "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md"}
    return {name: address for name, address in known.items() if address}


setup(
    long_description=redirected((ROOT / "README.md").read_text(encoding="utf-8"), target),
    long_description_content_type="text/markdown",
    project_urls=addresses(),
)
