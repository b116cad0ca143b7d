"""The benchmark page shows the results that are committed beside it."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import render

    yield render
    for name in ("render", "measuring"):
        sys.modules.pop(name, None)


def test_the_tables_are_those_of_the_results(render):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert render.rendered(page) == page


def test_a_result_without_a_place_on_the_page_is_refused(render):
    with pytest.raises(ValueError, match="README.md has no lines '<!-- "):
        render.rendered("no markers")


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.name)
def test_every_result_says_where_it_comes_from(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"commit", "command", "versions", "machine", "threads", "date"} <= record.keys()
