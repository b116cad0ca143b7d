"""A report as one HTML file: no network, no script needed to read it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dynlora.adapter_files.python_source import as_python
from dynlora.report.charts import Band, Chart, Line
from dynlora.report.conclusion import conclusion, lora_rank, metric_label, rank_rows, which_rank
from dynlora.report.layout import LayerStack, group_by_stack, shade_of, shade_ranges
from dynlora.report.recommend import (
    as_axolotl,
    mean_rank_by_kind,
    ranks_by_kind,
    same_ranks,
)
from dynlora.report.run import Points, RankState, Run

MAX_STATES = 60  # rank maps behind the slider; of more prune events an even choice


@dataclass(frozen=True)
class Cell:
    """One module in the rank map; ``index`` is its place in the slider's data."""

    rank: int
    shade: int
    index: int
    title: str


@dataclass(frozen=True)
class RankMap:
    """A layer list as a table of cells."""

    name: str
    layers: list[int]
    rows: list[tuple[str, list[Cell | None], str]]  # kind, cells, mean


def render_page(runs: Sequence[Run], *, version: str) -> str:
    """The report of one or several runs.

    Args:
        runs: what to show; rank maps for those that have ranks.
        version: of dynlora, for the foot of the page.
    """
    environment = Environment(
        loader=PackageLoader("dynlora.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = shared_charts(runs)
    sections = [_section(run) for run in runs]
    rows = [summary_row(run) for run in runs]
    return environment.get_template("page.html.j2").render(
        title=_title(runs),
        conclusions=[(run.name, conclusion(run)) for run in runs],
        facts=rows,
        facts_caption="The runs in figures" if len(runs) > 1 else "The run in figures",
        methods=method_rows(runs),
        charts=[(chart, chart.svg(i)) for i, chart in enumerate(charts)],
        shade_ranges=shade_ranges,
        sections=[
            section
            | {"charts": [(c, c.svg(100 * n + i)) for i, c in enumerate(section["charts"], 100)]}
            for n, section in enumerate(sections, start=1)
        ],
        version=version,
    )


def summary_row(run: Run) -> dict[str, str]:
    """The run in one line of the comparison, as texts by column name."""
    row = {"run": run.name, "method": run.method}
    if run.seed is not None:
        row["seed"] = str(run.seed)
    row["state"] = "finished" if run.is_finished else f"at step {_last_step(run):,}"
    if run.states:
        first, last = run.states[0], run.states[-1]
        row["components"] = f"{first.live:,} → {last.live:,}"
        row["mean rank"] = f"{_mean(first):.3g} → {_mean(last):.3g}"
        if one := run.parameters_of_rank_one:
            row["parameters"] = f"{run.parameters_at(first):,} → {run.parameters_at(last):,}"
            row["as a LoRA of rank"] = f"{lora_rank(run, first):.3g} → {lora_rank(run, last):.3g}"
            row["LoRA of rank 1"] = f"{one:,} parameters"
    for name in run.metrics():
        row[metric_label(name)] = f"{run.series(name)[-1][1]:.4g}"
    row["time"] = duration(run.seconds)
    if run.memory:
        row["peak memory"] = f"{max(value for _, value in run.memory) / 2**20:,.0f} MiB"
    return row


def method_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Last value of each metric by method, as mean ± standard deviation; [] without repeated methods."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    if all(len(group) == 1 for group in groups.values()):
        return []
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    rows = []
    for method, group in groups.items():
        row = {"method": method, "runs": str(len(group))}
        for name in names:
            ends = [points[-1][1] for run in group if (points := run.series(name))]
            row[metric_label(name)] = _mean_and_spread(ends)
        rows.append(row)
    return rows


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def duration(seconds: float) -> str:
    """Wall time for people.

    >>> [duration(s) for s in (0.4, 75, 3700)]
    ['0.4 s', '1 min 15 s', '1 h 1 min']
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def shared_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses and metrics, all runs in one picture each."""
    charts = [_compared(runs, "loss", "Training loss", "loss")]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    for name in names:
        label = name.removeprefix("eval_")
        charts.append(_compared(runs, name, f"Evaluation: {label}", label))
    return [chart for chart in charts if any(line.points for line in chart.lines)]


def _compared(runs: Sequence[Run], key: str, title: str, label: str) -> Chart:
    lines = [Line(run.name, run.series(key), color=i) for i, run in enumerate(runs)]
    lines = [line for line in lines if line.points]
    ends = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines)
    return Chart(title, label, lines, summary=ends)


def run_charts(run: Run) -> list[Chart]:
    """What only one run has: budget, importance, revivals, DEM, memory; of these what there is."""
    charts = [_size_chart(run), _budget_chart(run)]
    if run.auto is None:
        charts += [_importance_chart(run), _turnover_chart(run)]
    dem = run.series("dynlora/dem") or [(e["step"], e["dem"]) for e in run.prunes if e.get("dem")]
    charts.append(_single("DEM, the penalty on uneven components", "R", dem))
    memory = [(step, value / 2**20) for step, value in run.memory]
    charts.append(_single("Memory in use", "MiB", memory))
    return [c for c in charts if any(line.points for line in c.lines)]


def _single(title: str, label: str, points: Points) -> Chart:
    ends = f"from {points[0][1]:.4g} to {points[-1][1]:.4g}" if points else ""
    return Chart(title, label, [Line(label, points)], summary=f"{title}: {ends}.")


def _budget_chart(run: Run) -> Chart:
    if not run.states:
        return Chart("Budget", run.unit)
    total, last = run.states[0].cost, run.states[-1]
    live: Points = [(s.step, s.cost) for s in run.states]
    end = max(run.total_steps, last.step)
    planned: Points = [] if run.auto else [(run.states[0].step, total), *run.schedule]
    if planned and run.schedule:
        planned.append((end, run.schedule[-1][1]))
    if run.is_finished:
        live.append((end, live[-1][1]))
    lines = [Line("used", live, color=0, is_stepped=True)]
    if planned:
        lines.append(Line("schedule", planned, color=1, is_stepped=True, is_dashed=True))
    return Chart(
        f"Budget in {run.unit}" + (": used, and the schedule of Eq. 9" if planned else ""),
        run.unit,
        lines,
        summary=f"From {total:,} to {last.cost:,} {run.unit} by step {last.step:,}.",
    )


_IMPORTANCE_UNITS = {
    "share": "share of the module's update",
    "norm": "norm of the component's update",
    "sensitivity": "⟨b, ∂L/∂b⟩",
    "own": "score of your own function",
}


def _size_chart(run: Run) -> Chart:
    """Held-out loss against size, as ``target_r="auto"`` found it."""
    if (found := run.auto) is None:
        return Chart("Held-out loss and size", "loss")
    tried = sorted({(cost, loss) for cost, loss in found["tried"] if math.isfinite(loss)})
    by_rank = [(cost, loss) for _, cost, loss in found["by_rank"] if math.isfinite(loss)]
    curve = sorted({*tried, *by_rank, (run.states[0].cost, found["reference"])})
    limit = [(curve[0][0], found["limit"]), (curve[-1][0], found["limit"])]
    loss = dict(curve).get(found["budget"], found["reference"])
    return Chart(
        "Held-out loss against size, and the size that was chosen",
        "held-out loss",
        [Line("loss", curve, color=0), Line("accepted", limit, color=1, is_dashed=True)],
        summary=f"{found['budget']:,} {run.unit} were chosen, with a loss of {loss:.4g} against "
        f"{found['reference']:.4g} of the whole adapter. {which_rank(found)}",
        x_label=run.unit,
        mark=(found["budget"], loss),
    )


def _importance_chart(run: Run) -> Chart:
    lines, bands = [], []
    for color, (key, name) in enumerate((("importance_kept", "kept"), ("importance_cut", "cut"))):
        known = [(e["step"], e[key]) for e in run.prunes if e.get(key)]
        steps = [step for step, _ in known]
        lines.append(Line(f"{name}: median", [(s, five[2]) for s, five in known], color=color))
        bands.append(Band(steps, [f[1] for _, f in known], [f[3] for _, f in known], color))
    return Chart(
        "Importance of kept and cut components",
        _IMPORTANCE_UNITS.get(run.importance, "score"),
        lines,
        bands,
        summary="Medians, and bands from the lower to the upper quartile, at each prune event.",
    )


def _turnover_chart(run: Run) -> Chart:
    lines = [Line("cut", [(e["step"], e.get("cut", 0)) for e in run.prunes], color=0)]
    revived = [(e["step"], e.get("revived", 0)) for e in run.prunes]
    if any(n for _, n in revived):
        lines.append(Line("revived", revived, color=1))
    counts = [f"{sum(n for _, n in line.points):,.0f} {line.name}" for line in lines]
    title = "Components cut and revived" if len(lines) > 1 else "Components cut"
    return Chart(
        f"{title} at each prune event", "components", lines, summary=f"{', '.join(counts)} in all."
    )


def _section(run: Run) -> dict[str, Any]:
    states = chosen_states(run.states)
    names = list(states[-1].ranks) if states else []
    maps, others = _maps(run, names) if states else ([], [])
    frames = [
        {"step": s.step, "live": s.live, "ranks": [s.ranks.get(n, 0) for n in names]}
        for s in states
    ]
    return {
        "run": run,
        "by_rank": [] if run.auto is None else rank_rows(run.auto),
        "maps": maps,
        "others": others,
        "frames": frames,
        "charts": run_charts(run),
        "advice": _advice(run),
        "kinds": list(mean_rank_by_kind(run.ranks).items()),
    }


def _advice(run: Run) -> list[tuple[str, str]]:
    """Texts of configs for the next run, each with a line that says what it is."""
    if not any(run.ranks.values()):
        return []
    exact = same_ranks(run.ranks, run.lora)
    short = ranks_by_kind(run.ranks, run.lora)
    texts = [("One rank for each kind of module:", as_python(short))] if short else []
    texts.append(("Exactly the ranks of this run, module by module:", as_python(exact)))
    if run.lora.get("task_type") in {None, "CAUSAL_LM"}:
        texts.append(("The same for axolotl:", as_axolotl(short or exact)))
    return texts


def chosen_states(states: Sequence[RankState]) -> list[RankState]:
    """At most ``MAX_STATES`` of the states, the first and the last among them."""
    if len(states) <= MAX_STATES:
        return list(states)
    last = len(states) - 1
    return [states[round(i * last / (MAX_STATES - 1))] for i in range(MAX_STATES)]


def _maps(run: Run, names: list[str]) -> tuple[list[RankMap], list[tuple[str, Cell]]]:
    index = {name: i for i, name in enumerate(names)}
    stacks, others = group_by_stack(run.ranks)
    maps = [RankMap(s.name, s.layers, _rows(s, run.init_r, index)) for s in stacks]
    loose = [(n, _cell(n, rank, run.init_r, index[n])) for n, rank in others.items()]
    return maps, loose


def _rows(
    stack: LayerStack, init_r: int, index: dict[str, int]
) -> list[tuple[str, list[Cell | None], str]]:
    rows = []
    for kind, row in stack.rows.items():
        cells: list[Cell | None] = []
        for layer in stack.layers:
            name = f"{stack.name}.{layer}.{kind}"
            cells.append(_cell(name, row[layer], init_r, index[name]) if layer in row else None)
        rows.append((kind, cells, f"{sum(row.values()) / len(row):.2f}"))
    return rows


def _cell(name: str, rank: int, init_r: int, index: int) -> Cell:
    return Cell(rank, shade_of(rank, init_r), index, name)


def _mean(state: RankState) -> float:
    return sum(state.ranks.values()) / len(state.ranks) if state.ranks else 0.0


def _last_step(run: Run) -> int:
    return max([0, *(s.step for s in run.states), *(step for step, _ in run.logs)])


def _title(runs: Sequence[Run]) -> str:
    return f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"


def write_page(runs: Sequence[Run], path: Path, *, version: str) -> Path:
    """Write the report under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(render_page(runs, version=version), encoding="utf-8")
    temporary.replace(path)
    return path
