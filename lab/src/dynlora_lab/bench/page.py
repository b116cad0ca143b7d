"""The results as one HTML page with plots, from a summary; it loads nothing from anywhere."""

import io
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynlora_lab.bench.text_tables import (
    cost_table,
    difference_table,
    duel_table,
    forgetting_note,
    has_best_epoch,
    provenance_text,
    published_source,
    rank_table,
    ranking_text,
    score_table,
    standing,
    sweep_table,
)

STYLE = {
    "svg.hashsalt": "dynlora",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
}
STYLE |= {"axes.spines.right": False}

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ summary.suite }}: results</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
figure { margin: 1rem 0; background: #fff; padding: .5rem; overflow-x: auto }
figcaption { color: #333 }
</style>
</head>
<body>
<h1>Results of the suite {{ summary.suite }}</h1>
<p>{{ standing }}</p>
{% for title, note, figure, head, rows in sections %}
<h2>{{ title }}</h2>
{% if note %}<p>{{ note }}</p>{% endif %}
{% if figure %}<figure role="img" aria-label="{{ title }}">{{ figure | safe }}</figure>{% endif %}
{% if rows %}<div class="wide"><table>
<thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>{% endif %}
{% endfor %}
<h2>Where this was computed</h2>
<p>{{ provenance }}</p>
</body>
</html>
""",
    autoescape=True,
    keep_trailing_newline=True,
)


def _best_epoch(summary: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    if not has_best_epoch(summary):
        return []
    return [(f"The best epoch by {summary['select']}", "", "", *score_table(summary, kind="best"))]


def as_html(summary: Mapping[str, Any]) -> str:
    """The page; the same summary gives the same bytes with the same matplotlib."""
    base = summary["baseline"]
    head, rows = sweep_table(summary)
    plain = [[cell.replace("**", "") for cell in row] for row in rows]
    with mpl.rc_context(STYLE):
        sections = [
            ("Scores after the last epoch", published_source(summary), "", *score_table(summary)),
            (
                f"Difference to {base}",
                "Mean over seeds and 95 % bootstrap interval; right of the line is better.",
                _differences(summary),
                *difference_table(summary),
            ),
            (
                "Each method against each other",
                "Mean of tasks: row minus column, with the interval.",
                "",
                *duel_table(summary),
            ),
            ("Ranks over tasks", ranking_text(summary), _ranks(summary), [], []),
            ("Where the ranks went", "Modules by final rank.", "", *rank_table(summary)),
            *_best_epoch(summary),
            ("Cost", forgetting_note(summary).strip(), "", *cost_table(summary)),
            (f"Learning rates, by {summary['select']}", "", _sweep(summary), head, plain),
        ]
    return PAGE.render(
        summary=summary,
        standing=standing(summary).replace("**", "").replace("`", ""),
        sections=sections,
        provenance=provenance_text(summary),
    )


def _differences(summary: Mapping[str, Any]) -> str:
    """A forest plot: a line per method and task."""
    found = [r for r in summary["rows"] if r["difference"]]
    if not found:
        return ""
    figure = Figure(figsize=(8, 0.8 + 0.22 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(found)):
        difference = row["difference"]
        low, high = difference["interval"] or (difference["mean"],) * 2
        axes.plot([low, high], [place, place], color="#4477aa", linewidth=1.5)
        axes.plot(difference["mean"], place, "o", color="#4477aa", markersize=4)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(found)), [f"{r['method']}, {r['task']}" for r in reversed(found)])
    axes.set_xlabel(f"better than {summary['baseline']} by")
    return _svg(figure)


def _ranks(summary: Mapping[str, Any]) -> str:
    """Mean ranks on a line; a bar joins what the critical difference does not part."""
    ranked = summary["ranking"]
    if ranked is None:
        return ""
    order = list(ranked["mean_rank"].items())
    figure = Figure(figsize=(8, 0.9 + 0.22 * len(order)), layout="constrained")
    axes = figure.subplots()
    for place, (name, rank) in enumerate(order):
        axes.plot([rank, rank], [0, -1 - place], color="#888888", linewidth=0.7)
        axes.text(rank, -1 - place, f" {name} {rank:.2f}", va="center")
    for height, group in enumerate(ranked["cliques"]):
        ranks = [ranked["mean_rank"][name] for name in group]
        level = 0.4 + 0.35 * height
        axes.plot([min(ranks), max(ranks)], [level, level], color="#cc3311", linewidth=3)
    axes.set_xlim(0.8, len(order) + 0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("mean rank, 1 is best")
    return _svg(figure)


def _sweep(summary: Mapping[str, Any]) -> str:
    """Score by learning rate, a panel per task; nothing where no method has two of them."""
    tasks = [t["name"] for t in summary["tasks"]]
    swept = Counter((e["task"], e["method"]) for e in summary["sweep"])
    if max(swept.values(), default=0) < 2:
        return ""
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, task in zip(panels, tasks, strict=False):
        _sweep_panel(axes, summary, task)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    rows = 14  # a longer legend is taller than its panel
    panels[0].legend(fontsize=7, frameon=False, ncols=-(-len(summary["methods"]) // rows))
    return _svg(figure)


def _sweep_panel(axes: Axes, summary: Mapping[str, Any], task: str) -> None:
    for method in summary["methods"]:
        points = [
            (e["learning_rate"], e["selected"])
            for e in summary["sweep"]
            if (e["task"], e["method"]) == (task, method)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=method)
    axes.set_xscale("log")
    axes.set_title(task, fontsize=9)


def _svg(figure: Figure) -> str:
    """The drawing as an element of the page, without the date and prologue."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
