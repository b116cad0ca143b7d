"""A suite: which tasks, methods, learning rates and seeds make an experiment, read from YAML."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dynlora_lab.tasks.offline import offline_model
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import checked_data
from dynlora_lab.tasks.typed_fields import RecipeError, build, read_fields, unknown_name

OWN_FIELDS = ("recipe", "learning_rates", "report", "scale")  # of a task, beside its recipe's
METHOD_FIELDS = ("rate_factor", "learning_rates", "ranks_of")  # of a method, beside its recipe's
RESERVED = "--"  # between the parts of a cell's name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a suite."""

    task: str
    method: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """Name of the cell and of its results file.

        >>> Cell(task="trec", method="lora", learning_rate=0.003, seed=1).key
        'trec--lora--lr0.003--seed1'
        """
        rate = f"lr{self.learning_rate:g}"
        return RESERVED.join((self.task, self.method, rate, f"seed{self.seed}"))


@dataclass(frozen=True, kw_only=True)
class Suite:
    """An experiment, checked.

    Attributes:
        name: of the suite and of its results folder.
        tasks: task name to the fields of its recipe, beside ``recipe`` (a file that ``defaults`` and
            these fields are laid over, relative to the suite's), ``learning_rates``, ``report`` and
            ``scale``, which override the suite's.
        methods: method name to the recipe fields that make it (``method``, ``adapter``), beside
            ``rate_factor``: its learning rates are the suite's times this, ``learning_rates``: its own
            ones, as many as the suite's, and ``ranks_of``: a method whose final ranks it takes as
            ``adapter.ranks``, task by task and seed by seed.
        learning_rates: the sweep, the same for every method.
        seeds: of the runs at the chosen learning rate.
        tune_seeds: of the sweep.
        select: evaluation set that chooses the learning rate and the best epoch.
        report: evaluation sets that the tables show, averaged; never looked at before.
        baseline: the method that the others are compared with, seed by seed.
        scale: the tables show a metric times this.
        defaults: recipe fields of every task.
        published: ``source`` and ``values`` (method to task to number), printed beside ours.
    """

    name: str
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    learning_rates: list[float]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    tune_seeds: list[int] = field(default_factory=lambda: [0])
    select: str = "validation"
    report: list[str] = field(default_factory=lambda: ["test"])
    baseline: str = "lora"
    scale: float = 100.0
    defaults: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what types do not say.

        Raises:
            ValueError: a list is empty, a name cannot be used, or the baseline is no method.
        """
        for name in ("tasks", "methods", "learning_rates", "seeds", "tune_seeds", "report"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one.")
        for name in (*self.tasks, *self.methods):
            if RESERVED in name or "/" in name:
                raise ValueError(f"name {name!r} must hold no {RESERVED!r} and no '/'; rename it.")
        for name, method in self.methods.items():
            own = method.get("learning_rates", self.learning_rates)
            if len(own) != len(self.learning_rates):
                raise ValueError(
                    f"methods.{name}.learning_rates={own} must hold {len(self.learning_rates)} rates, as "
                    "many as the suite's: no method may be tuned more than another."
                )
            if "ranks_of" in method and method["ranks_of"] not in self.methods:
                raise ValueError(unknown_name("ranks_of", method["ranks_of"], self.methods))
        if self.baseline not in self.methods:
            raise ValueError(unknown_name("baseline", self.baseline, self.methods))
        if self.select in self.report:
            raise ValueError(
                f"report={self.report} holds select={self.select!r}: what chooses the learning rate "
                "cannot be the measure; hold out a part of train with data.held_out."
            )

    def scale_of(self, task: str) -> float:
        """What the tables multiply the metric of this task by."""
        return float(self.tasks[task].get("scale", self.scale))

    def rates(self, task: str, method: str) -> list[float]:
        """The sweep of a method on a task, ascending."""
        factor = self.methods[method].get("rate_factor", 1.0)
        rates = self.tasks[task].get("learning_rates", self.learning_rates)
        rates = self.methods[method].get("learning_rates", rates)
        return sorted(float(f"{factor * rate:.6g}") for rate in rates)

    def reported(self, task: str) -> list[str]:
        """Evaluation sets that are shown for a task."""
        return list(self.tasks[task].get("report", self.report))

    def recipe(
        self, cell: Cell, output: Path, *, ranks: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Plain values of the recipe of a cell: defaults, then its task, then its method.

        Args:
            cell: which.
            output: folder of the run.
            ranks: what its method's ``ranks_of`` ended with.
        """
        task = {k: v for k, v in self.tasks[cell.task].items() if k not in OWN_FIELDS}
        method = {k: v for k, v in self.methods[cell.method].items() if k not in METHOD_FIELDS}
        own = {
            "seed": cell.seed,
            "output": str(output),
            "training": {"learning_rate": cell.learning_rate},
        }
        if ranks is not None:
            own["adapter"] = {"ranks": dict(ranks)}
        values: dict[str, Any] = {}
        for layer in (self.defaults, task, method, own):
            values = merged(values, layer)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def read_suite(path: Path) -> Suite:
    """The suite in a YAML file, every cell's recipe checked.

    Raises:
        RecipeError: the file cannot be read, or a field of the suite or of a recipe is unfit.
    """
    values = read_fields(path, what="suite", first="name")
    suite = suite_from(values, folder=path.parent)
    check_recipes(suite)
    return suite


def suite_from(values: Mapping[str, Any], *, folder: Path = Path()) -> Suite:
    """The suite in plain values; files that tasks name are looked for in ``folder``."""
    suite = build(Suite, values)
    tasks = {name: _with_file(suite, name, folder) for name in suite.tasks}
    return dataclasses.replace(suite, tasks=tasks)


def check_recipes(suite: Suite) -> None:
    """Build the recipe of every task with every method.

    Raises:
        RecipeError: names the task and the method whose recipe is unfit.
    """
    for task in suite.tasks:
        for method in suite.methods:
            rate = suite.rates(task, method)[0]
            cell = Cell(task=task, method=method, learning_rate=rate, seed=0)
            try:
                recipe = recipe_from(suite.recipe(cell, Path("cell")))
            except RecipeError as error:
                raise RecipeError(f"task {task!r} with method {method!r}: {error}") from error
            sets = recipe.data.evals if isinstance(recipe.data.evals, dict) else {}
            if next(iter(sets), None) != suite.select:
                raise RecipeError(
                    f"task {task!r}: data.evals={recipe.data.evals!r} must begin with the set "
                    f"{suite.select!r}, which chooses learning rate and best epoch."
                )
            missing = [name for name in suite.reported(task) if name not in sets]
            if missing:
                raise RecipeError(
                    f"task {task!r}: data.evals={sets} has no set {missing[0]!r}; the suite reports it."
                )


def check_parts(suite: Suite, tasks: Iterable[str]) -> None:
    """Read the data of ``tasks`` and look for their models, as their cells will.

    A part that is missing would otherwise fail cell after cell, each on record as tried.

    Raises:
        RecipeError: names the task whose data or model is missing or unfit, and the way out.
    """
    for task in tasks:
        rate = suite.rates(task, suite.baseline)[0]
        cell = Cell(task=task, method=suite.baseline, learning_rate=rate, seed=suite.seeds[0])
        recipe = recipe_from(suite.recipe(cell, Path("cell")))
        try:
            checked_data(recipe)
            kind, _, name = recipe.model.partition(":")
            if kind == "offline":
                offline_model(name)
        except RecipeError as error:
            raise RecipeError(f"task {task!r}: {error}") from error


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, sections field by field.

    >>> merged({"data": {"name": "a", "train": "t"}}, {"data": {"name": "b"}, "seed": 1})
    {'data': {'name': 'b', 'train': 't'}, 'seed': 1}
    """
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        is_section = isinstance(old, Mapping) and isinstance(value, Mapping) and name != "evals"
        result[name] = merged(old, value) if is_section else value  # type: ignore[arg-type]  # both are
    return result


def _with_file(suite: Suite, name: str, folder: Path) -> dict[str, Any]:
    """A task with the recipe file that it names read in, below the suite's defaults."""
    task = suite.tasks[name]
    if "recipe" not in task:
        return dict(task)
    path = folder / task["recipe"]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"task {name!r}: recipe {str(path)!r} cannot be read: {error}") from error
    below = {k: v for k, v in values.items() if k not in ("output", "seed", "method")}
    own = {k: v for k, v in task.items() if k != "recipe"}
    return merged(merged(below, suite.defaults), own)
