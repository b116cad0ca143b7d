"""Tables as text: Markdown, CSV, JSON and LaTeX, from a summary."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dynlora_lab.bench.statistics import mean_text

NONE = "-"

CSV_FIELDS = (
    "task",
    "method",
    "learning_rate",
    "seeds",
    "final",
    "final_std",
    "best",
    "best_std",
    "difference",
    "low",
    "high",
    "wins",
    "losses",
    "sign_p",
    "parameters_start",
    "parameters_end",
    "train_s",
    "peak_mib",
    "published",
)


def as_json(summary: Mapping[str, Any]) -> str:
    """The whole summary."""
    return json.dumps(summary, indent=1, sort_keys=True) + "\n"


def as_csv(summary: Mapping[str, Any]) -> str:
    """One line per task and method."""
    text = io.StringIO()
    fields = [*CSV_FIELDS, "forgetting"] if has_forgetting(summary) else list(CSV_FIELDS)
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in summary["rows"]:
        difference, cost = row["difference"] or {}, row["cost"] or {}
        low, high = difference.get("interval") or (None, None)
        flat = {**row, **cost, **difference, "low": low, "high": high}
        flat |= {"difference": difference.get("mean"), "seeds": len(row["seeds"])}
        writer.writerow({name: _cell(flat.get(name)) for name in fields})
    return text.getvalue()


def as_markdown(summary: Mapping[str, Any]) -> str:
    """Everything a reader of the repository sees."""
    parts = [
        f"# Results of the suite `{summary['suite']}`",
        "Written by `dynlora bench` from the files in `cells/`; edit nothing here.",
        standing(summary),
        "## Scores after the last epoch",
        f"Mean ± standard deviation over seeds (number of seeds where not {len(summary['seeds'])}). "
        f"The learning rate was chosen on the set `{summary['select']}`, which is not the one shown.",
        published_source(summary),
        markdown_table(*score_table(summary)),
        f"## Difference to {summary['baseline']}",
        "Seed by seed, positive is better; in brackets the 95 % bootstrap interval of the mean over "
        "these seeds (and, for the mean, these tasks); wins:losses with the p of an exact sign test.",
        markdown_table(*difference_table(summary)),
        "## Each method against each other",
        "Mean of tasks: row minus column, with the interval.",
        markdown_table(*duel_table(summary)),
        "## Ranks over tasks",
        ranking_text(summary),
        "## Where the ranks went",
        "Modules by final rank, `rank: modules`, mean over seeds.",
        markdown_table(*rank_table(summary)),
        *_best_epoch(summary),
        "## Cost",
        "Adapter parameters without the head at start and end, seconds of training with its "
        "evaluations, peak memory of the process (with a GPU: allocated on it)."
        + forgetting_note(summary),
        markdown_table(*cost_table(summary)),
        "## Learning rates",
        f"Score on `{summary['select']}` by learning rate; the chosen one in bold.",
        markdown_table(*sweep_table(summary)),
        "## Where this was computed",
        provenance_text(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def has_best_epoch(summary: Mapping[str, Any]) -> bool:
    """Whether any run was evaluated on the way, so that there is a best epoch to show."""
    return any(row["best"] is not None for row in summary["rows"])


def has_forgetting(summary: Mapping[str, Any]) -> bool:
    """Whether any run measured what the base knew before."""
    return any("forgetting" in row for row in summary["rows"])


def forgetting_note(summary: Mapping[str, Any]) -> str:
    """What the column of the cost table means; "" without it."""
    if not has_forgetting(summary):
        return ""
    return (
        " Forgetting: by how many nats a token the loss on data of the base's own domain grew, mean over "
        "seeds."
    )


def _best_epoch(summary: Mapping[str, Any]) -> list[str]:
    if not has_best_epoch(summary):
        return []
    return [
        "## The best epoch",
        f"At the evaluation that was best on `{summary['select']}`, of those within the final budget; "
        "papers often show the epoch that was best on the very set they report.",
        markdown_table(*score_table(summary, kind="best")),
    ]


def as_latex(summary: Mapping[str, Any]) -> str:
    """The table of scores, for booktabs."""
    head, rows = score_table(summary)
    lines = [
        f"% suite {summary['suite']}: mean and standard deviation over seeds, last epoch",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(_latex(c) for c in head) + r" \\",
        r"\midrule",
        *(" & ".join(_latex(c) for c in row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def standing(summary: Mapping[str, Any]) -> str:
    """How much of the suite has run; what failed."""
    cells = summary["cells"]
    text = f"{cells['done']} of {cells['planned']} cells are done"
    if cells["done"] + cells["failed"] < cells["planned"]:
        text += ": **the suite is not complete**, and what is missing below has not run"
    if cells["failed"]:
        listed = "; ".join(f"`{key}`: {error}" for key, error in cells["failures"].items())
        text += f". {cells['failed']} failed ({listed})"
    return text + "."


def published_source(summary: Mapping[str, Any]) -> str:
    """Where the published numbers are from; "" without any."""
    source = summary["published"].get("source")
    return f"Published: {source}." if source else ""


def score_table(
    summary: Mapping[str, Any], *, kind: str = "final"
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a method a line, a task a column, published numbers in lines of their own."""
    tasks = summary["tasks"]
    head = ["method", *(f"{t['name']} ({t['metric'] or NONE})" for t in tasks), "mean"]
    by_place = _rows_by_place(summary)
    rows = []
    for method in summary["methods"]:
        mine = [by_place[t["name"], method] for t in tasks]
        values = [r[kind] for r in mine]
        shown = [_score(r, kind, len(summary["seeds"])) for r in mine]
        rows.append([method, *shown, _mean(values)])
        published = [r["published"] for r in mine]
        if any(value is not None for value in published):
            rows.append([f"{method}, published", *map(_number, published), _mean(published)])
    if any(t["without_a_model"] for t in tasks):
        plain = [(t["without_a_model"] or {}).get(t["metric"]) for t in tasks]
        rows.append(["constant answer", *map(_number, plain), _mean(plain)])
    return head, rows


def difference_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a method a line, a task a column, all tasks together in the last."""
    head = ["method", *(t["name"] for t in summary["tasks"]), "mean of tasks"]
    by_place = _rows_by_place(summary)
    rows = [
        [
            entry["method"],
            *(
                difference_text(by_place[t["name"], entry["method"]]["difference"])
                for t in summary["tasks"]
            ),
            difference_text(entry["difference"]),
        ]
        for entry in summary["overall"]
        if entry["method"] != summary["baseline"]
    ]
    return head, rows


def duel_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a method a line and a column, the mean over all tasks in each place."""
    methods = summary["methods"]
    found = {(d["method"], d["against"]): d["difference"] for d in summary["duels"]}
    rows = [
        [row, *(_with_interval(found.get((row, column))) for column in methods)] for row in methods
    ]
    return ["method", *methods], rows


def cost_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one line per task and method."""
    has_known = has_forgetting(summary)
    head = ["task", "method", "parameters, start", "end", "seconds", "MiB"]
    head += ["forgetting"] if has_known else []
    rows = [
        [
            row["task"],
            row["method"],
            *(f"{row['cost'][k]:,.0f}" for k in ("parameters_start", "parameters_end")),
            *(f"{row['cost'][k]:,.0f}" for k in ("train_s", "peak_mib")),
            *([_signed(row.get("forgetting"))] if has_known else []),
        ]
        for row in summary["rows"]
        if row["cost"]
    ]
    return head, rows


def rank_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a method with ranks a line, a task a column."""
    by_place = _rows_by_place(summary)
    tasks = [t["name"] for t in summary["tasks"]]
    rows = [
        [method, *(_by_rank(by_place[task, method]["modules_by_rank"]) for task in tasks)]
        for method in summary["methods"]
        if any(by_place[task, method]["modules_by_rank"] for task in tasks)
    ]
    return ["method", *tasks], rows


def sweep_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one line per task and method, the rates and what they reached."""
    chosen = {(r["task"], r["method"]): r["learning_rate"] for r in summary["rows"]}
    lines: dict[tuple[str, str], list[str]] = {}
    for entry in summary["sweep"]:
        place = (entry["task"], entry["method"])
        text = f"{entry['learning_rate']:g}: {entry['selected']:.2f}"
        is_chosen = entry["learning_rate"] == chosen[place]
        lines.setdefault(place, []).append(f"**{text}**" if is_chosen else text)
    rows = [[*place, ", ".join(texts)] for place, texts in lines.items()]
    return ["task", "method", "learning rate: score"], rows


def ranking_text(summary: Mapping[str, Any]) -> str:
    """Mean ranks and what cannot be told apart."""
    ranked = summary["ranking"]
    if ranked is None:
        return "At least two methods and two tasks that all methods have are needed."
    friedman = NONE if ranked["friedman_p"] is None else f"{ranked['friedman_p']:.3g}"
    ranks = ", ".join(f"{m} {rank:.2f}" for m, rank in ranked["mean_rank"].items())
    cliques = "; ".join(" = ".join(group) for group in ranked["cliques"]) or "none"
    return (
        f"Mean rank over {ranked['tasks']} tasks, 1 is best: {ranks}. Friedman test that all are equal: "
        f"p = {friedman}. Methods whose mean ranks are less than {ranked['critical_difference']:.2f} apart "
        f"(Nemenyi, 5 %) cannot be told apart: {cliques}."
    )


def provenance_text(summary: Mapping[str, Any]) -> str:
    """Machines, commits, versions and dates."""
    where = summary["provenance"]
    versions = ", ".join(f"{p} {' and '.join(v)}" for p, v in where["versions"].items())
    return (
        f"{where['cell_hours']} cell hours, {where['from'] or NONE} to {where['to'] or NONE}. Machines: "
        f"{'; '.join(where['machines']) or NONE}. Commits: {', '.join(where['commits']) or NONE}. "
        f"Versions: {versions or NONE}."
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, or "" without rows.

    >>> print(markdown_table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---|
    | x | 1 |
    """
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace(" --- ", "---")


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """``+0.84 [+0.10, +1.60] 4:1, p 0.38``."""
    if difference is None:
        return NONE
    score = f"{difference['wins']}:{difference['losses']}, p {difference['sign_p']:.2g}"
    return f"{_with_interval(difference)} {score}"


def _with_interval(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return NONE
    return mean_text(difference["mean"], difference["interval"])


def _rows_by_place(summary: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["method"]): row for row in summary["rows"]}


def _score(row: Mapping[str, Any], kind: str, seeds: int) -> str:
    if row[kind] is None:
        return NONE
    text = f"{row[kind]:.2f}"
    if row[f"{kind}_std"] is not None:
        text += f" ± {row[f'{kind}_std']:.2f}"
    return text if len(row["seeds"]) == seeds else f"{text} ({len(row['seeds'])})"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.3f}"


def _by_rank(modules: Mapping[str, float] | None) -> str:
    if modules is None:
        return NONE
    return ", ".join(f"{rank}: {round(count, 1):g}" for rank, count in modules.items())


def _mean(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    return f"{sum(found) / len(found):.2f}" if len(found) == len(values) else NONE


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _latex(text: str) -> str:
    escaped = text.replace("±", r"$\pm$").replace(" - ", " -- ")
    for sign in "%_&#":
        escaped = escaped.replace(sign, rf"\{sign}")
    return escaped
