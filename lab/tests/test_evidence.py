"""Pages quote tables: each of their lines is in the rendered results that it names."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("evidence.md", "beyond-the-paper.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_quoted_line_is_in_the_results(page):
    text = (DOCS / page).read_text(encoding="utf8")
    quotes = re.findall(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert quotes
    for source, quoted in quotes:
        lines = (DOCS / source).read_text(encoding="utf8").splitlines()
        rows = [line for line in quoted.splitlines() if line.strip()]
        assert len(rows) > 2
        for row in rows:
            assert row in lines, row


@pytest.mark.parametrize("page", PAGES)
def test_no_table_of_the_page_is_written_by_hand(page):
    text = (DOCS / page).read_text(encoding="utf8")
    outside = re.sub(r"<!-- from .*?<!-- end -->", "", text, flags=re.DOTALL)
    assert not [line for line in outside.splitlines() if line.startswith("|")]
