"""A report in the terminal: the table of runs and the final ranks of each."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynlora.report.conclusion import conclusion, metric_label
from dynlora.report.page import duration, summary_row
from dynlora.report.rank_grid import rank_grid
from dynlora.report.run import Run

BLOCKS = "▁▂▃▄▅▆▇█"


def report_view(runs: Sequence[Run], *, width: int) -> RenderableType:
    """What came out, figures side by side, loss and ranks of each; as wide as the terminal at most."""
    parts: list[RenderableType] = []
    for run in runs:
        if text := conclusion(run):
            name = f"{run.name}: " if len(runs) > 1 else ""
            parts.append(Padding(Text(name + text), (0, 0, 1, 0)))
    parts.append(_facts(runs))
    for run in runs:
        if len(runs) > 1:
            parts.append(_heading(run.name))
        loss = [value for _, value in run.series("loss")]
        if loss:
            parts.append(Text(f"loss {loss[0]:.4g} → {loss[-1]:.4g}  {sparkline(loss, width=32)}"))
        if run.ranks:
            parts += [Text(), rank_grid(run.ranks, init_r=run.init_r, width=width)]
    return Group(*parts)


def live_view(run: Run, *, width: int) -> RenderableType:
    """A run under way: how far it is, its last numbers and its ranks now."""
    step = max([0, *(s for s, _ in run.logs), *(s.step for s in run.states)])
    total = run.total_steps or step
    last: dict[str, float] = {}
    for _, logs in run.logs:
        last |= logs
    loss = [value for _, value in run.series("loss")]
    rows = Table.grid(padding=(0, 2))
    state = "finished" if run.is_finished else f"{step / max(total, 1):.0%}"
    rows.add_row("step", f"{step:,} of {total:,} ({state}), {duration(run.seconds)}")
    if loss:
        rows.add_row("loss", f"{loss[-1]:.4g}  {sparkline(loss, width=32)}")
    for name in run.metrics():
        rows.add_row(metric_label(name), f"{last[name]:.4g}")
    if run.states:
        live = sum(run.ranks.values())
        mean = live / max(len(run.ranks), 1)
        rows.add_row("ranks", f"{live:,} components, mean rank {mean:.3g}")
    if run.prunes:
        cut, back = (sum(e.get(k, 0) for e in run.prunes) for k in ("cut", "revived"))
        rows.add_row("prunings", f"{len(run.prunes)}, {cut:,} cut, {back:,} revived")
    grid = [Text(), rank_grid(run.ranks, init_r=run.init_r, width=width)] if run.ranks else []
    return Group(rows, *grid)


def sparkline(values: Sequence[float], *, width: int) -> str:
    """A curve of block characters, lowest to highest value.

    >>> sparkline([0, 1, 2, 3], width=4)
    '▁▃▆█'
    """
    step = max(len(values) / width, 1.0)
    shown = [values[int(i * step)] for i in range(int(len(values) / step))]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in shown)


def _facts(runs: Sequence[Run]) -> Table:
    """One column a run, so that it fits a narrow terminal."""
    rows = [summary_row(run) for run in runs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    for name in names:
        table.add_row(name, *(row.get(name, "") for row in rows))
    return table


def _heading(text: str) -> RenderableType:
    return Padding(Text(text, style="bold"), (1, 0, 0, 0))
