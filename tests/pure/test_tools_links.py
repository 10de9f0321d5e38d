"""Relative links of Markdown, as the site and a package index need them."""

import runpy

import pytest
import setuptools

from tests.documents import ROOT
from tools.links import LINK, redirected

TEXT = """[page](docs/a.md#part), ![picture](docs/b.png), [`code`](c.py), [far](https://example.org/x), [here](#part)
`[not a link](d.md)`
```
[nor this](e.md)
```
"""


def test_relative_links_lead_where_they_are_told_and_nothing_else_changes():
    seen = []

    def target(link, picture):
        seen.append((link, picture))
        return f"/{link}"

    new = redirected(TEXT, target)
    assert seen == [("docs/a.md#part", False), ("docs/b.png", True), ("c.py", False)]
    expected = TEXT
    for link, _ in seen:
        expected = expected.replace(f"]({link})", f"](/{link})")
    assert new == expected


def test_without_a_target_words_stay_and_pictures_go():
    first = redirected(TEXT, lambda link, picture: None).splitlines()[0]
    assert first == "page, , `code`, [far](https://example.org/x), [here](#part)"


@pytest.mark.parametrize("repository", ["", "https://example.org/owner/name"])
def test_the_description_on_an_index_has_no_relative_link(repository, monkeypatch):
    said = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: said.update(arguments))
    monkeypatch.setenv("REPOSITORY_URL", repository)
    monkeypatch.delenv("SITE_URL", raising=False)
    runpy.run_path(str(ROOT / "setup.py"))
    links = [target for _, _, target in LINK.findall(said["long_description"])]
    assert all(link.startswith(("https://", "#")) for link in links)
    assert bool(said["project_urls"]) == bool(repository)
    assert not repository or f"{repository}/blob/main/docs/masks.md" in links
