"""The evidence page quotes tables: each of their lines is in the rendered results that it names."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "evidence.md").read_text(encoding="utf8")
QUOTED = re.findall(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", PAGE, flags=re.DOTALL)


def test_every_quoted_line_is_in_the_results():
    assert QUOTED
    for source, quoted in QUOTED:
        lines = (DOCS / source).read_text(encoding="utf8").splitlines()
        rows = [line for line in quoted.splitlines() if line.strip()]
        assert len(rows) > 2
        for row in rows:
            assert row in lines, row


def test_no_table_of_the_page_is_written_by_hand():
    outside = re.sub(r"<!-- from .*?<!-- end -->", "", PAGE, flags=re.DOTALL)
    assert not [line for line in outside.splitlines() if line.startswith("|")]
