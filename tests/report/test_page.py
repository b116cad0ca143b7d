"""What a person sees of a run: the page, the pictures, the terminal, and the advice for the next run."""

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console

from dynlora.history import HISTORY_FILE, HistoryFile
from dynlora.report.charts import Chart, Line, round_numbers, thinned
from dynlora.report.page import MAX_STATES, chosen_states, method_rows, render_page, write_page
from dynlora.report.picture import CELL, rank_image, write_picture
from dynlora.report.recommend import recommended_config
from dynlora.report.run import RankState, read_run, read_runs
from dynlora.report.terminal import live_view, report_view
from tiny_models import tiny_bert

KINDS = ["attention.self.query", "attention.output.dense", "output.dense"]


def names(layers):
    return [f"bert.encoder.layer.{i}.{kind}" for i in range(layers) for kind in KINDS]


def write_run(folder, *, layers=3, steps=100, every=5, init_r=6, record=None):
    """A history as a run of ``steps`` leaves it; each prune event takes one component."""
    file = HistoryFile(folder)
    ranks = dict.fromkeys([*names(layers), "classifier"], init_r)
    events = range(every, steps // 2 + 1, every)
    total = sum(ranks.values())
    memory = {"process": 300 * 2**20}
    file.append({"event": "start", "step": 0, "time": 1000.0, "ranks": dict(ranks), "total_steps": steps,
                 "window": [0, steps // 2], "component_sizes": dict.fromkeys(ranks, 10),
                 "schedule": [[s, total - i] for i, s in enumerate(events, start=1)],
                 "memory_bytes": memory})  # fmt: skip
    for step in range(1, steps + 1):
        time = 1000.0 + step
        if step in events:
            live = [name for name, rank in ranks.items() if rank]
            ranks[live[step % len(live)]] -= 1
            file.append({"event": "prune", "step": step, "time": time, "ranks": dict(ranks), "cut": 1,
                         "revived": 0, "budget": sum(ranks.values()), "dem": 1 / step,
                         "importance_kept": [0.1, 0.2, 0.3, 0.4, 0.5], "importance_cut": None,
                         "gate_mean": 0.1, "gate_max": 0.2})  # fmt: skip
        file.append({"event": "log", "step": step, "time": time, "memory_bytes": memory,
                     "logs": {"loss": 2 / step, "learning_rate": 1e-3}})  # fmt: skip
        if step % 50 == 0:
            file.append({"event": "log", "step": step, "time": time, "memory_bytes": memory,
                         "logs": {"eval_accuracy": step / steps, "eval_loss": 1.0,
                                  "eval_runtime": 3.0}})  # fmt: skip
    file.append({"event": "end", "step": steps, "time": 1000.0 + steps, "ranks": ranks,
                 "budget": sum(ranks.values()), "is_frozen": True, "memory_bytes": memory})  # fmt: skip
    if record:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def run(tmp_path):
    return read_run(write_run(tmp_path / "one"))


class Elements(HTMLParser):
    """Start tags with their attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "link", "input", "line", "polyline", "polygon", "circle"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


# -- reading -------------------------------------------------------------------------------------


def test_a_run_is_read_with_its_ranks_over_time(run):
    assert [s.step for s in run.states] == [0, *range(5, 51, 5)]
    assert [sum(s.ranks.values()) for s in run.states] == [60 - i for i in range(11)]
    assert [b for _, b in run.schedule] == [59 - i for i in range(10)]
    assert run.metrics() == ["eval_loss", "eval_accuracy"]
    assert run.series("eval_accuracy") == [(50, 0.5), (100, 1.0)]
    assert run.parameters_at(run.states[-1]) == 500
    assert run.seconds == 100
    assert run.is_finished


def test_the_pause_before_a_resume_is_no_run_time(tmp_path):
    file = HistoryFile(tmp_path)
    for event, step, time in [
        ("start", 0, 0.0),
        ("log", 5, 10.0),
        ("start", 5, 900.0),
        ("log", 9, 904.0),
    ]:
        file.append({"event": event, "step": step, "time": time})
    assert read_run(tmp_path).seconds == 14


def test_the_ranks_of_the_best_checkpoint_are_the_final_ones(tmp_path):
    """load_best_model_at_end may bring back ranks from before the last prune event."""
    file = HistoryFile(tmp_path)
    for event, step, rank in [("start", 0, 3), ("prune", 5, 1), ("end", 9, 2)]:
        file.append(
            {"event": event, "step": step, "time": 0.0, "ranks": {"l.0.a": rank}, "budget": rank}
        )
    assert read_run(tmp_path).ranks == {"l.0.a": 2}


def test_a_run_without_ranks_is_read_from_its_record(tmp_path):
    record = {"recipe": {"method": "lora"}, "seed": 3, "status": "done", "train_s": 8.0,
              "evaluations": [{"step": 10, "eval_loss": 0.5}]}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record))
    run = read_run(tmp_path)
    assert (run.method, run.seed, run.seconds, run.is_finished) == ("lora", 3, 8.0, True)
    assert run.series("eval_loss") == [(10, 0.5)]
    assert "has no dynamic ranks" in render_page([run], version="1")


def test_several_runs_get_names_that_tell_them_apart(tmp_path):
    paths = [write_run(tmp_path / a / "seed1", steps=10) for a in ("lora", "ours")]
    assert [run.name for run in read_runs(paths)] == ["lora/seed1", "ours/seed1"]
    assert len({run.name for run in read_runs([paths[0], paths[0]])}) == 2


def test_seeds_of_one_method_are_summed_up(tmp_path):
    paths = []
    for method, seed, score in [("lora", 1, 0.5), ("lora", 2, 0.7), ("ours", 1, 0.9)]:
        folder = tmp_path / f"{method}{seed}"
        folder.mkdir()
        record = {"recipe": {"method": method}, "seed": seed, "status": "done",
                  "evaluations": [{"step": 10, "eval_f1": score}]}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record))
        paths.append(folder)
    assert method_rows(read_runs(paths)) == [
        {"method": "lora", "runs": "2", "f1": "0.6 ± 0.14"},
        {"method": "ours", "runs": "1", "f1": "0.9"},
    ]
    assert method_rows(read_runs(paths[1:])) == []


def test_a_folder_without_a_run_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither history.jsonl nor run.json"):
        read_run(tmp_path)


# -- page ----------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_is_well_formed(run):
    page = render_page([run], version="1")
    elements = Elements(page)
    assert elements.open == []
    assert [a for _, a in elements.tags if "src" in a] == []
    assert [a["href"] for _, a in elements.tags if "href" in a] == ["data:,", "#content"]
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_the_page_can_be_read_by_a_screen_reader_and_a_keyboard(run):
    elements = Elements(render_page([run], version="1"))
    assert elements.all("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in elements.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for svg in elements.all("svg"):
        assert svg["role"] == "img"
        assert set(svg["aria-labelledby"].split()) <= set(ids)
    assert {label["for"] for label in elements.all("label")} == {
        a["id"] for a in elements.all("input")
    }
    assert all("scope" in cell for cell in elements.all("th"))
    regions = [a for a in elements.all("div") if a.get("class") == "scroll"]
    assert regions
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def test_the_map_shows_final_ranks_and_the_slider_all_states(run):
    elements = Elements(render_page([run], version="1"))
    cells = [a for a in elements.all("td") if "data-i" in a]
    assert len(cells) == len(run.ranks) == 10
    text = "".join(elements.text)
    frames = json.loads(re.search(r"\[\{\"budget.*?\}\]", text)[0])
    assert [f["step"] for f in frames] == [s.step for s in run.states]
    assert [sum(f["ranks"]) for f in frames] == [f["budget"] for f in frames]


def test_names_from_outside_cannot_write_html(tmp_path):
    evil = tmp_path / "<script>alert(1)<"
    run = read_run(write_run(evil, steps=10))
    page = render_page([run], version="1")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page


def test_a_large_run_stays_below_one_and_a_half_megabytes(tmp_path):
    """80 layers, 240 modules, 250 prune events, 500 logs; and three of them side by side."""
    folder = write_run(tmp_path / "big", layers=80, steps=500, every=1, init_r=12)
    page = render_page(read_runs([folder] * 3), version="1")
    assert len(page.encode()) < 1.5e6
    states = chosen_states(read_run(folder).states)
    assert len(states) == MAX_STATES
    assert (states[0].step, states[-1].step) == (0, 250)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, run):
    path = write_page([run], tmp_path / "new" / "report.html", version="1")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("importance", "unit"),
    [("sensitivity", "|c · ∂L/∂c|"), ("own", "score of your own function"),
     ("share", "share of the module's update"), ("", "score")],
)  # fmt: skip
def test_the_chart_of_scores_says_what_was_scored(run, importance, unit):
    page = Elements(render_page([dataclasses.replace(run, importance=importance)], version="1"))
    assert unit in [text.strip() for text in page.text]


def test_every_curve_of_the_issue_is_on_the_page(run):
    text = "".join(Elements(render_page([run], version="1")).text)
    for title in ("Training loss", "Evaluation: accuracy", "Components: live against the schedule",
                  "Importance of kept and cut", "Cut and revived", "DEM", "Memory in use",
                  "For the next run"):  # fmt: skip
        assert title in text, title


# -- charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 0.0), (5, 0.0)], [(1, -2.0), (2, 3e9)], []])
def test_any_curve_can_be_drawn(points):
    svg = Chart("t", "y", [Line("a", points)]).svg(0)
    assert "nan" not in svg
    assert "inf" not in svg


def test_ticks_are_round_and_inside():
    for low, high in [(0, 1), (-3, 17), (1e-6, 3e-6), (99, 101)]:
        ticks = round_numbers(low, high)
        assert 3 <= len(ticks) <= 10
        assert low - 1e-12 <= min(ticks) <= max(ticks) <= high + 1e-12


def test_few_points_are_marked_for_what_lies_between_was_not_measured():
    lines = [Line("few", [(0, 1), (9, 2)]), Line("many", [(i, i) for i in range(40)])]
    assert Chart("t", "y", lines).svg(0).count("<circle") == 2


def test_long_curves_are_thinned_but_keep_their_ends():
    points = [(i, float(i)) for i in range(5000)]
    kept = thinned(points)
    assert len(kept) == 400
    assert (kept[0], kept[-1]) == (points[0], points[-1])


# -- pictures ------------------------------------------------------------------------------------


def test_the_image_for_tensorboard_has_a_square_a_module(run):
    image = rank_image(run.ranks)
    assert image.shape == (4 * CELL, 3 * CELL, 3)
    assert image.dtype == np.uint8
    dark, bright = rank_image({"l.0.a": 0, "l.1.a": 5})[0, [0, -1]]
    assert dark.sum() < bright.sum()


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_rank_map_is_written_as_a_picture(tmp_path, run, suffix, magic):
    pytest.importorskip("matplotlib")
    assert write_picture(run, tmp_path / f"ranks{suffix}").read_bytes().startswith(magic)
    with pytest.raises(ValueError, match=r"must end in .png or .svg"):
        write_picture(run, tmp_path / "ranks.jpg")


# -- terminal ------------------------------------------------------------------------------------


def in_terminal(view, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(view)
    return console.file.getvalue()


def test_the_terminal_shows_figures_and_ranks_in_80_columns(tmp_path, run):
    other = read_run(write_run(tmp_path / "a-rather-long-name-for-a-run", steps=20))
    text = in_terminal(report_view([run, other], width=80))
    assert max(map(len, text.splitlines())) <= 80
    assert "60 → 50" in text
    assert "attention.self.query" in text


def test_a_run_under_way_says_how_far_it_is(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / HISTORY_FILE).read_text().splitlines(keepends=True)
    (folder / HISTORY_FILE).write_text("".join(lines[:45]))
    text = in_terminal(live_view(read_run(folder), width=80))
    assert "of 100" in text
    assert "finished" not in text
    shutil.rmtree(folder)


# -- advice --------------------------------------------------------------------------------------


def test_the_recommended_config_gives_each_kind_its_rank_in_peft():
    """``output.dense`` is the end of ``attention.output.dense``, and each keeps its own rank."""
    wanted = {"attention.self.query": 3, "attention.output.dense": 2, "output.dense": 4}
    ranks = {
        f"bert.encoder.layer.{i}.{kind}": rank for i in range(2) for kind, rank in wanted.items()
    }
    config = eval(recommended_config(ranks), {"LoraConfig": LoraConfig})  # noqa: S307  # our own text
    model = get_peft_model(tiny_bert(), config)
    found = {
        n: m.r["default"] for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")
    }
    assert found == ranks
    assert all(m.scaling["default"] == 1 for m in model.modules() if hasattr(m, "lora_A"))


def test_a_kind_of_rank_zero_is_left_out_even_where_its_name_ends_like_another():
    wanted = {"attention.output.dense": 0, "output.dense": 4}
    ranks = {
        f"bert.encoder.layer.{i}.{kind}": rank for i in range(2) for kind, rank in wanted.items()
    }
    config = eval(recommended_config(ranks), {"LoraConfig": LoraConfig})  # noqa: S307  # our own text
    model = get_peft_model(tiny_bert(), config)
    found = {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found == {name for name, rank in ranks.items() if rank}


def test_states_are_not_thinned_where_there_are_few():
    states = [RankState(i, 1, {"a": 1}) for i in range(5)]
    assert chosen_states(states) == states
