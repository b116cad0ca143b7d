"""``dynlora train``: run a recipe, or say what it would do."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynlora.cli.terminal import (
    FAILED,
    INTERRUPTED,
    USER_MISTAKE,
    print_error,
    report_error,
)
from dynlora_lab.cli.progress import is_shown, progress
from dynlora_lab.cli.terminal import quiet_run
from dynlora_lab.tasks.interrupt import Interrupted
from dynlora_lab.tasks.plan import Plan, plan
from dynlora_lab.tasks.progress import Listener
from dynlora_lab.tasks.recipe import Recipe, read_recipe
from dynlora_lab.tasks.run import run

Output = Literal["terminal", "quiet", "json"]
EVENTS_SHOWN = 6  # prunings of a schedule, in a plan for people


def train(
    path: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    output: Output,
    debug: bool,
) -> int:
    """Run, print and return the exit code: 0 done, 1 failed, 2 a mistake, 130 Ctrl-C."""
    try:
        _refuse_near_flags(overrides)
        with quiet_run():
            recipe = read_recipe(path, overrides)
            if dry_run:
                _show_plan(plan(recipe), output)
                return 0
            with _listener(output) as listener:
                result = run(recipe, resume=resume, overwrite=overwrite, listener=listener)
            if result.trainer.is_world_process_zero():
                _show_result(recipe, result.record, output)
    except (ValueError, OSError) as error:
        return report_error(error, code=USER_MISTAKE, debug=debug)
    except FloatingPointError as error:
        return report_error(error, code=FAILED, debug=debug)
    except Interrupted as stopped:
        print_error(_way_on(path, overrides, stopped))
        return INTERRUPTED
    return 0


def _refuse_near_flags(overrides: Sequence[str]) -> None:
    """``--dryrun`` and ``--dry_run`` would be read as fields of the recipe, and train.

    Raises:
        ValueError: one is a flag of ``dynlora train`` but for its hyphens.
    """
    flags = {flag.replace("-", ""): flag for flag in ("--dry-run", "--resume", "--overwrite")}
    for given in overrides:
        flag = flags.get(given.replace("-", "").replace("_", ""))
        if flag and given.startswith("--"):
            raise ValueError(f"unknown option {given!r}; did you mean {flag!r}?")


def plan_view(planned: Plan) -> RenderableType:
    """A plan for people."""
    table = Table.grid(padding=(0, 2))
    counts = " + ".join(f"{n:,} {name}".strip() for name, n in planned.eval_rows.items())
    table.add_row("rows", f"{planned.train_rows:,} to train on, {counts} to measure on")
    for note in planned.notes:
        table.add_row("", note)
    table.add_row("optimizer steps", f"{planned.steps:,}")
    if planned.components_start:
        table.add_row("components, at the start", f"{planned.components_start:,}")
    for name, number in planned.parameters.items():
        table.add_row(f"parameters, {name.replace('_', ', at the ')}", f"{number:,}")
    table.add_row("memory", f"{planned.memory_bytes / 2**20:,.0f} MiB, without activations")
    unit = planned.recipe["adapter"]["budget"]
    for number, (step, budget) in enumerate(_shown(planned.schedule)):
        when = f"after step {step:,}" if step else "at the start"
        table.add_row("" if number else "budget", f"{budget:,} {unit} {when}")
    resolved = yaml.safe_dump(_without_empty(planned.recipe), sort_keys=False, allow_unicode=True)
    return Group(Text(resolved.rstrip()), Text(), table)


def _shown(schedule: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first, the last, and some prunings between them."""
    if len(schedule) <= EVENTS_SHOWN:
        return schedule
    last = len(schedule) - 1
    return [schedule[round(i * last / (EVENTS_SHOWN - 1))] for i in range(EVENTS_SHOWN)]


def _show_plan(planned: Plan, output: Output) -> None:
    if output == "json":
        _print_json({"event": "plan", **dataclasses.asdict(planned)})
    elif output == "terminal":
        Console().print(plan_view(planned), highlight=False)


def _show_result(recipe: Recipe, record: Mapping[str, Any], output: Output) -> None:
    if output == "json":
        _print_json({"event": "result", "output": str(recipe.output), **record})
    elif output == "terminal":
        Console().print(result_view(recipe, record), highlight=False)


def result_view(recipe: Recipe, record: Mapping[str, Any]) -> RenderableType:
    """What came out, for people."""
    before: Mapping[str, float] = next((e for e in record["evaluations"] if e["step"] == 0), {})
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("")
    for name in ("without a model", "before", "after"):
        table.add_column(name, justify="right")
    for key, value in record["metrics"].items():
        if is_shown(key):
            name = key.removeprefix("eval_")
            plain = record["baselines"].get(name.rpartition("_")[2], record["baselines"].get(name))
            table.add_row(name, _number(plain), _number(before.get(key)), _number(value))
    budget = record["budget"]
    size = f"{budget['parameters_start']:,} -> {budget['parameters_end']:,} parameters"
    if budget["modules"]:
        start, end = budget["components_start"], budget["components_end"]
        ranks = f", {start:,} -> {end:,} components in {budget['modules']} modules"
        size += ranks + f", mean rank {end / budget['modules']:.3g}"
    seconds = f"{record['steps']} steps in {record['train_s']:.0f} s"
    return Group(Text(), table, Text(), Text(size), Text(f"{seconds}; saved in {recipe.output}"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


@contextlib.contextmanager
def _listener(output: Output) -> Iterator[Listener]:
    if output == "quiet" or os.environ.get("RANK", "0") != "0":  # one process of several tells
        yield Listener()
    elif output == "json":
        yield Listener(
            announce=lambda line: _print_json({"event": "stage", "text": line}),
            on_log=lambda step, logs: _print_json({"event": "log", "step": step, **logs}),
        )
    else:
        with progress(Console(stderr=True)) as listener:
            yield listener


def _way_on(path: Path, overrides: Sequence[str], stopped: Interrupted) -> str:
    if not stopped.has_checkpoint:
        return f"stopped after step {stopped.step}; this method cannot go on from a checkpoint."
    again = " ".join(["dynlora train", str(path), *overrides, "--resume"])
    return f"stopped after step {stopped.step}, which is saved; go on with: {again}"


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values for YAML, without fields that are not set."""
    plain: Callable[[Any], Any] = lambda v: (  # noqa: E731
        _without_empty(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v
    )
    return {k: plain(v) for k, v in values.items() if v is not None and v != {} and v != ()}


def _print_json(content: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, default=str) + "\n")
    sys.stdout.flush()
