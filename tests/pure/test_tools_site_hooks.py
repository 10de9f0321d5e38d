"""The site's hooks on a page's HTML."""

import pytest

from tools.site_hooks import on_page_content

pytest.importorskip("latex2mathml")


def test_code_in_tables_has_the_pipe_that_its_markdown_had_to_escape():
    page = "<p><code>a \\| b</code></p><table><tr><td><code>a \\| b</code></td><td>c</td></tr></table>"
    assert on_page_content(page) == page[:24] + page[24:].replace("\\|", "|")


def test_formulas_become_mathml():
    page = on_page_content('<span class="arithmatex">\\(x_i &lt; 2\\)</span>')
    assert page.startswith("<math") and "arithmatex" not in page and "<mo>&#x0003C;</mo>" in page
