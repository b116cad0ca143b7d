"""What a person sees of a run: the page, its charts, the pictures and the terminal."""

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from dynlora.history import HISTORY_FILE, HistoryFile
from dynlora.report import rank_image
from dynlora.report.charts import MAX_POINTS, compared, importance_chart, write_picture
from dynlora.report.conclusion import conclusion
from dynlora.report.page import MAX_STATES, render_page, write_page
from dynlora.report.rank_map import CELL
from dynlora.report.run import Run, read_run, read_runs
from dynlora.report.terminal import report_view
from runs_on_disk import write_run


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
        if tag not in {"meta", "link", "input", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


# -- reading -------------------------------------------------------------------------------------


def test_a_run_is_read_with_its_ranks_over_time(run):
    assert [step for step, _ in run.states] == [0, *range(5, 51, 5)]
    assert [sum(ranks.values()) for _, ranks in run.states] == [60 - i for i in range(11)]
    assert [run.cost(ranks) for _, ranks in run.states] == [600 - 10 * i for i in range(11)]
    assert run.unit == "parameters"
    assert run.metrics() == ["eval_loss", "eval_accuracy"]
    assert run.series("eval_accuracy") == [(50, 0.5), (100, 1.0)]
    assert run.parameters(run.ranks) == 500
    assert run.lora_rank(run.ranks) == 5
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
            {"event": event, "step": step, "time": 0.0, "ranks": {"l.0.a": rank}, "cost": rank}
        )
    assert read_run(tmp_path).ranks == {"l.0.a": 2}


def test_a_run_without_ranks_is_read_from_its_record(tmp_path):
    record = {"recipe": {"method": "lora"}, "seed": 3, "status": "done", "train_s": 8.0,
              "evaluations": [{"step": 10, "eval_loss": 0.5}]}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record))
    run = read_run(tmp_path)
    assert (run.method, run.seconds, run.is_finished) == ("lora", 8.0, True)
    assert run.series("eval_loss") == [(10, 0.5)]
    assert "has no dynamic ranks" in render_page([run], version="1")


def test_several_runs_get_names_that_tell_them_apart(tmp_path):
    paths = [write_run(tmp_path / a / "seed1", steps=10) for a in ("lora", "ours")]
    assert [run.name for run in read_runs(paths)] == ["lora/seed1", "ours/seed1"]
    assert len({run.name for run in read_runs([paths[0], paths[0]])}) == 2


def test_a_folder_without_a_run_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither history.jsonl nor run.json"):
        read_run(tmp_path)


# -- page ----------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_is_well_formed(run):
    page = render_page([run], version="1")
    elements = Elements(page)
    assert elements.open == []
    assert all(a["src"].startswith("data:") for _, a in elements.tags if "src" in a)
    assert [a["href"] for _, a in elements.tags if "href" in a] == ["data:,", "#content"]
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_the_page_can_be_read_by_a_screen_reader_and_a_keyboard(run):
    elements = Elements(render_page([run], version="1"))
    assert elements.all("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in elements.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert len(elements.all("img")) == 5
    assert all(image["alt"] for image in elements.all("img"))
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
    frames = json.loads(re.search(r"\[\{\"live.*?\}\]", text)[0])
    assert [f["step"] for f in frames] == [step for step, _ in run.states]
    assert [sum(f["ranks"]) for f in frames] == [f["live"] for f in frames]


def test_the_head_of_the_map_stays_over_its_columns_where_a_phone_scrolls_it(run):
    page = render_page([run], version="1")
    held = [rule for rule in re.findall(r"([^{}]+)\{[^}]*position: sticky", page) if ".map" in rule]
    assert [rule.strip() for rule in held] == [".map th:first-child", ".map .mean"]
    head = re.search(r"<thead><tr>(<th[^>]*>kind.*?)</tr>", page)[1]
    assert head.endswith('<th scope="col" class="mean">mean</th>')


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
    frames = json.loads(re.search(r">(\[\{\"live.*?\}\])<", page)[1])
    assert len(frames) == MAX_STATES
    assert (frames[0]["step"], frames[-1]["step"]) == (0, 250)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, run):
    path = write_page([run], tmp_path / "new" / "report.html", version="1")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("importance", "unit"),
    [("sensitivity", "⟨b, ∂L/∂b⟩"), ("own", "score of your own function"),
     ("share", "share of the module's update"), ("", "score")],
)  # fmt: skip
def test_the_chart_of_scores_says_what_was_scored(run, importance, unit):
    events = [event | {"importance": importance} for event in run.events]
    assert unit in importance_chart(dataclasses.replace(run, events=events)).svg


def test_the_page_draws_what_there_is(run):
    text = "".join(Elements(render_page([run], version="1")).text)
    for title in ("Training loss", "Evaluation: accuracy", "Budget in parameters: used, and the schedule",
                  "Importance of kept and cut", "For the next run"):  # fmt: skip
        assert title in text, title


def test_one_sentence_on_top_says_what_came_out(run):
    assert conclusion(run) == (
        "500 of 600 parameters stay (83 %), as many as in a LoRA of rank 5. Accuracy 1, evaluation loss 1. "
        "8 of 10 modules end at rank 6, the start: a higher r may help."
    )
    assert conclusion(run) in "".join(Elements(render_page([run], version="1")).text)


def test_empty_modules_are_counted_and_a_run_under_way_says_so(tmp_path):
    file = HistoryFile(tmp_path)
    start = {
        "event": "start",
        "step": 0,
        "time": 0.0,
        "ranks": {"l.0.a": 3, "l.1.a": 3},
        "total_steps": 9,
    }
    file.append(start)
    file.append({**start, "event": "prune", "step": 5, "ranks": {"l.0.a": 0, "l.1.a": 2}})
    assert conclusion(read_run(tmp_path)) == (
        "After step 5 of 9: 2 of 6 components stay (33 %). 1 of 2 modules are empty."
    )


def test_figures_stand_below_each_other_so_that_a_phone_shows_them(run):
    elements = Elements(render_page([run], version="1"))
    rows = [a for a in elements.all("th") if a.get("scope") == "row"]
    assert len(rows) > 10
    text = "".join(elements.text)
    assert "6 → 5" in text  # the rank of a LoRA of that size
    assert "600 → 500" in text


# -- charts --------------------------------------------------------------------------------------


def drawn(points, tmp_path):
    events = [{"event": "log", "step": step, "logs": {"loss": value}} for step, value in points]
    return compared([Run("a", tmp_path, events, {})], "loss", "Loss").svg


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 0.0), (5, 0.0)], [(1, -2.0), (2, 3e9)], []])
def test_any_curve_can_be_drawn(points, tmp_path):
    svg = drawn(points, tmp_path)
    assert "nan" not in svg
    assert "inf" not in svg


def test_few_points_are_marked_for_what_lies_between_was_not_measured(tmp_path):
    few, many = drawn([(0, 0), (39, 39)], tmp_path), drawn([(i, i) for i in range(40)], tmp_path)
    assert few.count("<use ") == many.count("<use ") + 2  # the others are the ticks of both


def test_long_curves_are_thinned(tmp_path):
    zigzag = drawn([(i, float(i % 2 * i)) for i in range(5001)], tmp_path)
    assert zigzag.count("\nL ") <= 2 * MAX_POINTS


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
    text = in_terminal(report_view([read_run(folder)], width=80))
    assert "of 100" in text
    assert "finished" not in text
    shutil.rmtree(folder)


def test_a_run_whose_modules_stand_in_no_list_of_layers_is_drawn(tmp_path):
    ranks = {"up": 3, "down": 1}
    run = Run("a", tmp_path, [{"event": "start", "step": 0, "ranks": ranks}], {})
    assert "Modules outside of any layer list" in render_page([run], version="1")
    assert write_picture(run, tmp_path / "ranks.png").is_file()
