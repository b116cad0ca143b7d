"""A report as one HTML file: no network, no script needed to read it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dynlora.files import whole_file
from dynlora.report.charts import run_charts, shared_charts
from dynlora.report.conclusion import conclusion, next_config, rank_rows, summary_row
from dynlora.report.rank_map import COLORS, group_by_stack, shade_of, shade_ranges
from dynlora.report.run import Run, evenly

MAX_STATES = 60  # rank maps behind the slider; of more prune events an even choice


def write_page(runs: Sequence[Run], path: Path, *, version: str) -> Path:
    """Write the report of one or several runs; ``version`` is that of dynlora, for the foot."""
    with whole_file(path) as temporary:
        temporary.write_text(render_page(runs, version=version), encoding="utf-8")
    return path


def render_page(runs: Sequence[Run], *, version: str) -> str:
    """The page: what came out, figures and losses of all runs, and a section for each."""
    environment = Environment(
        loader=PackageLoader("dynlora.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared",
        conclusions=[(run.name, conclusion(run)) for run in runs],
        facts=[summary_row(run) for run in runs],
        charts=shared_charts(runs),
        sections=[_section(run) for run in runs],
        colors=COLORS,
        mean=_mean,
        shade_of=shade_of,
        shade_ranges=shade_ranges,
        version=version,
    )


def _mean(row: Mapping[int, int], ranks: Sequence[int]) -> float:
    """Mean rank of a row of the map, which holds places in ``ranks`` by layer."""
    return sum(ranks[place] for place in row.values()) / len(row)


def _section(run: Run) -> dict[str, Any]:
    names = list(run.ranks)
    stacks, others = group_by_stack({name: i for i, name in enumerate(names)})
    frames = [
        {"step": step, "live": sum(r.values()), "ranks": [r.get(n, 0) for n in names]}
        for step, r in evenly(run.states, MAX_STATES)
    ]
    return {
        "run": run,
        "frames": frames,
        "stacks": stacks,
        "others": others,
        "charts": run_charts(run),
        "by_rank": [] if run.auto is None else rank_rows(run.auto),
        "config": next_config(run.ranks, run.start.get("lora", {}))
        if any(run.ranks.values())
        else "",
    }
