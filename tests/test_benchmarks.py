"""The benchmark page shows the results that are committed beside it."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").rglob("*.json"))


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


def gpu_run(folder, commit, date, **sections):
    """Write what one run of the GPU check leaves."""
    head = {
        "commit": commit, "date": date, "command": f"python {commit}.py --until 2.5",
        "versions": {"torch": "2", "transformers": "5", "peft": "0"},
        "machine": {"device": "G", "cores": 1},
    }  # fmt: skip
    for section, cases in sections.items():
        path = folder / commit / f"{section}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**head, "cases": cases}))


def timed(ms):
    row = {"ms": ms, "host_ms": 1.0, "peer": "LoRA", "ratio": 1.5, "spread": [1.4, 1.6]}
    return {"arms": {"ours": {**row, "step_peak_bytes": 2**30}}}


def test_a_gpu_run_is_rendered_with_what_it_left_out(render, tmp_path):
    promises = {
        "NaN": {
            "step": "no error",
            "freeze": "E: refused. Go away.",
            "end": "E: refused. Go away.",
        },
        "auto": {"evaluations": 9, "found": {"budget": 7, "tried": []}, "seconds": 1},
        "graph": {"left_out": "1 s left of 3"},
    }
    gpu_run(tmp_path, "abc", "2026-01-01", steps={"small": timed(2.0)}, promises=promises)
    page = render.gpu_tables(tmp_path)
    assert "**Steps: small** (at abc)" in page
    assert "| ours | 2.0 ms | 1.0 ms | 1.500 (1.400 to 1.600) | LoRA | 1.00 GiB |" in page
    assert "| NaN | step: no error; freeze, end: E: refused | abc |" in page
    assert "| auto | evaluations: 9; budget: 7 | abc |" in page
    assert "*Not run: promises: graph: 1 s left of 3.*" in page
    assert page.endswith(
        "*`python abc.py` at abc, 2026-01-01; torch 2, transformers 5, peft 0; G, 1 cores.*"
    )


def test_of_several_gpu_runs_the_newest_result_of_each_case_is_shown(render, tmp_path):
    left_out, failed = {"left_out": "no time"}, {"error": "a traceback", "seconds": 1}
    old = {"kept": timed(1.0), "again": timed(2.0), "fails now": timed(3.0), "no longer": left_out}
    new = {"kept": left_out, "again": timed(4.0), "fails now": failed, "never": left_out}
    gpu_run(tmp_path, "zzz", "2026-01-01", steps=old)
    gpu_run(tmp_path, "abc", "2026-01-02", steps=new)
    gpu_run(tmp_path, "idle", "2026-01-01", steps={"never": left_out})
    page = render.gpu_tables(tmp_path)
    for name, commit, ms in (("kept", "zzz", 1), ("again", "abc", 4), ("fails now", "zzz", 3)):
        head = f"**Steps: {name}** (at {commit})"
        assert page.partition(head)[2].partition("| ours | ")[2].startswith(f"{ms}.0 ms"), name
    assert [line for line in page.splitlines() if "Not run" in line] == [
        "*Not run: steps: never: no time.*"
    ]
    sources = [line for line in page.splitlines() if line.startswith("*`python")]
    assert [line.split(" ")[3].rstrip(",") for line in sources] == ["zzz", "abc"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_result_says_where_it_comes_from(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"commit", "command", "versions", "machine", "threads", "date"} <= record.keys()
