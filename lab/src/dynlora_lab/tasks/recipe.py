"""A recipe: one YAML file that says everything about a run, and the command line's last word on it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dynlora_lab.methods import DEFAULTS, METHODS
from dynlora_lab.methods.options import NOT_OFFERED, AdapterOptions
from dynlora_lab.tasks.base_model import BaseOptions
from dynlora_lab.tasks.data import DataSource
from dynlora_lab.tasks.family import Family, family_named
from dynlora_lab.tasks.typed_fields import (
    RecipeError,
    build,
    check_values,
    field_types,
    read_fields,
    unknown_name,
)

SECTIONS = ("data", "options", "base", "adapter", "training")

SHORTHANDS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "rank": "target_r",
    "r": "target_r",
}
"""Names that people try first, too far from the real ones to be found by their letters."""

OWNED_BY_THE_RUN = {
    "output_dir": "set the recipe's field output",
    "seed": "set the recipe's field seed",
    "resume_from_checkpoint": "use the option --resume",
    "disable_tqdm": "use the options --quiet and --json",
    "remove_unused_columns": "the task family decides it",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, checked.

    Attributes:
        task: family of tasks, such as ``text-classification``.
        model: hub id or folder of the base model, or ``offline:NAME``.
        method: how the model is adapted, such as ``dynlora``, ``lora`` or ``full``.
        output: folder that the run makes.
        seed: draws head and adapter and orders the data; the same for every method.
        data: which rows.
        options: the task family's own fields.
        base: how the base model is loaded (dtype, revision, quantization).
        adapter: ranks, schedule and targets, the same fields for every method.
        training: any fields of the trainer's arguments (TrainingArguments or a subclass).
    """

    task: str
    model: str
    output: Path
    data: DataSource
    method: str = "dynlora"
    seed: int = 0
    options: Any = None
    base: BaseOptions = field(default_factory=BaseOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The family that ``task`` names."""
        return family_named(self.task)

    @property
    def offline_name(self) -> str | None:
        """NAME of a model that is given as ``offline:NAME``."""
        kind, _, name = self.model.partition(":")
        return name if kind == "offline" else None

    def to_dict(self) -> dict[str, Any]:
        """The recipe resolved: plain values, every field of ours spelled out."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``--field value`` pairs put over it.

    Args:
        path: the file.
        overrides: such as ``["--seed", "3", "--training.learning_rate=1e-3", "--target_r", "4"]``;
            a field of a section may go without the section's name where only one section knows it.

    Raises:
        RecipeError: the file cannot be read, or a field is unknown, missing or of a wrong type.
    """
    values = read_fields(path, what="recipe", first="task")
    return recipe_from(values, overrides)


def recipe_from(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in plain values; otherwise as :func:`read_recipe`."""
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    pairs = _pairs(overrides)
    for name, value in pairs:  # the task first: it decides which fields there are
        if name == "task":
            merged["task"] = value
    if "task" not in merged:
        raise RecipeError("field 'task' is missing; add it to the recipe.")
    family = family_named(str(merged["task"]))
    for name, value in pairs:
        _put(merged, name, value, family)
    return _checked(merged, family)


def _checked(values: dict[str, Any], family: Family) -> Recipe:
    plain = check_values(Recipe, {k: v for k, v in values.items() if k not in SECTIONS})
    method = plain.get("method", "dynlora")
    if method not in METHODS:
        raise RecipeError(unknown_name("method", method, METHODS))
    section = {name: values.get(name) or {} for name in SECTIONS}
    given = DEFAULTS.get(method, {}) | section["adapter"]
    adapter = build(AdapterOptions, given, section="adapter.", refused=NOT_OFFERED)
    try:
        adapter.refuse_beside(method)
    except ValueError as error:
        raise RecipeError(f"adapter.{error}") from error
    return build(
        Recipe,
        {
            **plain,
            "data": build(DataSource, section["data"], section="data."),
            "options": build(family.options, section["options"], section="options."),
            "base": build(BaseOptions, section["base"], section="base."),
            "adapter": adapter,
            "training": check_values(
                family.arguments,
                section["training"],
                section="training.",
                refused=OWNED_BY_THE_RUN | _renamed(family.arguments),
            ),
        },
    )


def _pairs(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """``--a.b 1 --c=2`` as [("a.b", 1), ("c", 2)]; values are read as YAML."""
    pairs = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise RecipeError(f"{name!r} is out of place; write --field value.")
        if not equals:
            if not rest:
                raise RecipeError(f"{name} has no value; write {name} value.")
            value = rest.pop(0)
        try:
            pairs.append((name[2:].replace("-", "_"), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise RecipeError(f"{name} is {value!r}, which cannot be read as YAML.") from error
    return pairs


def _put(values: dict[str, Any], name: str, value: Any, family: Family) -> None:
    """Set the field ``name``, which may leave out its section."""
    known = known_fields(family)
    section, _, inner = name.partition(".")
    if inner and section in known:
        below = values.setdefault(section, {})
        if isinstance(below, dict):  # anything else is refused when the recipe is checked
            below[inner] = value
        return
    if name in known[""] or name in SECTIONS:
        values[name] = value
        return
    owners = [s for s in SECTIONS if name in known.get(s, ())]
    if len(owners) > 1:
        both = " and ".join(f"--{owner}.{name}" for owner in owners)
        raise RecipeError(f"--{name} could mean {both}; write one of them.")
    if not owners:
        if name in SHORTHANDS:
            raise RecipeError(f"unknown option '--{name}'; did you mean '--{SHORTHANDS[name]}'?")
        if name in NOT_OFFERED:
            raise RecipeError(f"option '--{name}' may not be given: {NOT_OFFERED[name]}.")
        bare = {f for fields in known.values() for f in fields}
        raise RecipeError(unknown_name("option", name, bare, section="--"))
    _put(values, f"{owners[0]}.{name}", value, family)


def _renamed(arguments: type) -> dict[str, str]:
    """The shorthands of fields of the section ``training``, as a message says them."""
    fields = field_types(arguments)
    return {short: f"it is called {name}" for short, name in SHORTHANDS.items() if name in fields}


def known_fields(family: Family) -> dict[str, list[str]]:
    """Field names by section; those of the recipe itself under ""."""
    return {
        "": [f for f in field_types(Recipe) if f not in SECTIONS],
        "data": list(field_types(DataSource)),
        "options": list(field_types(family.options)),
        "base": list(field_types(BaseOptions)),
        "adapter": list(field_types(AdapterOptions)),
        "training": [f for f in field_types(family.arguments) if f not in OWNED_BY_THE_RUN],
    }
