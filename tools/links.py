"""Relative links of Markdown, for readers who do not stand in the repository: the site, and a package index."""

from __future__ import annotations

import re
from collections.abc import Callable

# `[text](target)` and `![text](target)`, outside of code.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
ELSEWHERE = ("http://", "https://", "mailto:", "#")


def redirected(markdown: str, target: Callable[[str, bool], str | None]) -> str:
    """The text with other targets for its relative links.

    Args:
        markdown: the text. Links whose words are code keep them; code itself is left as it is.
        target: of a link, and whether it is a picture, the new link; None for the words of the link alone, or for no
            picture.
    """
    codes: list[str] = []

    def hide(found: re.Match[str]) -> str:
        codes.append(found[0])
        return f"\0{len(codes) - 1}\0"

    def link(found: re.Match[str]) -> str:
        picture, words, old = found.groups()
        if old.startswith(ELSEWHERE):
            return found[0]
        new = target(old, bool(picture))
        if new is None:
            return "" if picture else words
        return f"{picture}[{words}]({new})"

    linked = LINK.sub(link, CODE.sub(hide, markdown))
    return re.sub("\0(\\d+)\0", lambda found: codes[int(found[1])], linked)
