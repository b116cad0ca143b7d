"""Pages quote tables: each of their lines is in the rendered results that it names."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FIRST_PAGE = DOCS / "evidence.md"
PAGES = [DOCS / "beyond-the-paper.md", *sorted((DOCS / "evidence").glob("*.md"))]
QUOTE = re.compile(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
TOLD = re.compile(
    r"\((-?[\d.]+\d) to (-?[\d.]+\d)[,;)]"
)  # (-0.08 to 0.02), (0.63 to 1.65, 30 pairs)
MEASURED = re.compile(r"\[([-+][\d.]+), ([-+][\d.]+)\]")


def text_of(path):
    return path.read_text(encoding="utf8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_quoted_line_is_in_the_results(page):
    quotes = QUOTE.findall(text_of(page))
    assert quotes
    for source, quoted in quotes:
        lines = text_of(page.parent / source).splitlines()
        rows = [line for line in quoted.splitlines() if line.strip()]
        assert len(rows) > 2
        for row in rows:
            assert row in lines, row


@pytest.mark.parametrize("page", [FIRST_PAGE, *PAGES], ids=lambda page: page.name)
def test_no_table_of_the_page_is_written_by_hand(page):
    outside = QUOTE.sub("", text_of(page))
    assert not [line for line in outside.splitlines() if line.startswith("|")]


def test_every_interval_of_the_first_page_is_in_the_results_that_its_links_quote():
    checked = 0
    text = text_of(FIRST_PAGE).replace("\N{MINUS SIGN}", "-")
    for item in re.split(r"\n\n|\n(?=- )", text):
        measured = set()
        for name in re.findall(r"\]\((evidence/[\w-]+\.md)", item):
            for source, _ in QUOTE.findall(text_of(DOCS / name)):
                results = text_of((DOCS / name).parent / source)
                found = {(float(low), float(high)) for low, high in MEASURED.findall(results)}
                measured |= found | {(-high, -low) for low, high in found}  # row minus column
        for low, high in TOLD.findall(" ".join(item.split())):
            interval = (float(low), float(high))
            assert interval in measured, (interval, item)
            checked += 1
    assert checked > 30


def test_the_first_page_names_every_page():
    assert {f"evidence/{page.name}" for page in PAGES[1:]} <= set(
        re.findall(r"evidence/[\w-]+\.md", text_of(FIRST_PAGE))
    )
