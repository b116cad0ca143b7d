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
    for name in ("render", "render_gpu", "tables", "measuring"):
        sys.modules.pop(name, None)


def test_the_tables_are_those_of_the_results(render):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert render.rendered(page) == page


def test_a_result_without_a_place_on_the_page_is_refused(render):
    with pytest.raises(ValueError, match="README.md has no lines '<!-- "):
        render.rendered("no markers")


def test_a_gpu_record_is_rendered_with_what_was_left_out(render, tmp_path):
    row = {"ms": 2.0, "host_ms": 1.0, "peer": "LoRA", "ratio": 1.5, "spread": [1.4, 1.6]}
    head = {
        "commit": "abc", "date": "today", "command": "python x", "machine": {"device": "G", "cores": 1},
        "versions": {"torch": "2", "transformers": "5", "peft": "0"},
    }  # fmt: skip
    cases = {
        "steps": {"small": {"arms": {"ours": {**row, "step_peak_bytes": 2**30}}}},
        "promises": {
            "NaN": {"step": "refused", "seconds": 1},
            "graph": {"left_out": "1 s left of 3"},
        },
    }
    for section, found in cases.items():
        (tmp_path / f"{section}.json").write_text(json.dumps({**head, "cases": found}))
    page = render.gpu_tables(tmp_path)
    assert "| ours | 2.0 ms | 1.0 ms | 1.500 (1.400 to 1.600) | LoRA | 1.00 GiB |" in page
    assert "| NaN | step: refused |" in page
    assert "*Not run: promises: graph: 1 s left of 3.*" in page


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.name)
def test_every_result_says_where_it_comes_from(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"commit", "command", "versions", "machine", "threads", "date"} <= record.keys()
