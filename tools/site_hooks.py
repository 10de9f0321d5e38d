"""What mkdocs needs beside its configuration: links that leave docs/, included files, and formulas as MathML.

mkdocs calls the two functions `on_...` (mkdocs.yml, `hooks`). In the repository the pages are read as they stand.
"""

from __future__ import annotations

import html
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.links import redirected

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
LONG = 80  # characters of an inline formula that does not fit on a narrow screen

log = logging.getLogger("mkdocs.hooks.site")


@dataclass(frozen=True)
class _Site:
    """Where a page's links lead.

    Attributes:
        docs: the folder of the pages.
        repository: address of the repository; empty where the host has not said it.
        files: what mkdocs writes.
        config: mkdocs' own.
    """

    docs: Path
    repository: str
    files: Any
    config: Any

    def text(self, markdown: str, source: Path, page: Path) -> str:
        """The text of file ``source`` as it has to be on ``page``: pictures are copied, and links are rewritten.

        A link to a page stays one. A link to another file leads to the repository, or becomes plain text.
        """

        def target(link: str, picture: bool) -> str | None:
            file, sign, anchor = link.partition("#")
            path = (source.parent / file).resolve()
            if not path.exists():
                log.warning("%s links to %s, which is not there", source.name, link)
            if path.is_relative_to(self.docs):
                return os.path.relpath(path, page.parent) + sign + anchor
            where = path.relative_to(ROOT).as_posix()
            if picture:
                self._add(where)
                return os.path.relpath(self.docs / where, page.parent)
            return f"{self.repository}/blob/main/{where}" if self.repository else None

        return redirected(markdown, target)

    def _add(self, where: str) -> None:
        """Take a file of the repository into the site, at the same path."""
        from mkdocs.structure.files import File

        if self.files.get_file_from_path(where) is None:
            self.files.append(File.generated(self.config, where, abs_src_path=str(ROOT / where)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    docs = Path(config["docs_dir"])
    site = _Site(docs, (config["repo_url"] or "").rstrip("/"), files, config)
    path = docs / page.file.src_uri

    def included(found: re.Match[str]) -> str:
        source = (path.parent / found[1]).resolve()
        _, _, body = source.read_text().partition("\n")  # the page has a title of its own
        return site.text(body, source, path)

    return INCLUDE.sub(included, site.text(markdown, path, path))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw themselves; and in tables a pipe in code without its backslash."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        tex, block = html.unescape(found[2]).strip(), found[1] == "div"
        formula = convert(tex, display="block" if block else "inline")
        wide = not block and len(tex) > LONG
        return f'<span class="long-formula">{formula}</span>' if wide else formula

    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), FORMULA.sub(drawn, content))
