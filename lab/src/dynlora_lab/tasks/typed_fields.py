"""Values from YAML or the command line, checked against the fields of a dataclass."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

MAX_LISTED = 30  # known names in a message
_LENIENT = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=False)


class RecipeError(ValueError):
    """A mistake in a recipe or in the data it names: one line that names the way out."""


def read_fields(path: Path, *, what: str, first: str) -> dict[str, Any]:
    """The fields in a YAML file.

    Args:
        path: the file.
        what: what it is called in an error, such as "recipe".
        first: the field that such a file begins with, for an empty one.

    Raises:
        RecipeError: the file is missing, cannot be read as YAML, or holds no fields.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{what} {str(path)!r} is not a file; check its name.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{what} {str(path)!r} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{what} {str(path)!r} holds no fields; begin with '{first}: …'.")
    return values


def build(
    cls: type[T],
    values: Mapping[str, Any],
    *,
    section: str = "",
    refused: Mapping[str, str] = {},
) -> T:
    """An instance of the dataclass ``cls`` from plain values.

    ``"1e-3"``, which YAML reads as text, becomes a float where a float is due; nothing else is guessed.

    Args:
        cls: a dataclass whose ``__post_init__`` may raise ValueError.
        values: field name to value.
        section: prefix of the field names in messages, such as ``training.``.
        refused: fields that may not be given, with the way out.

    Raises:
        RecipeError: a field is unknown (names the nearest one), refused, missing or has a wrong type.

    >>> @dataclasses.dataclass
    ... class Knobs:
    ...     rate: float
    >>> build(Knobs, {"rate": "1e-3"})
    Knobs(rate=0.001)
    >>> build(Knobs, {"rat": 1})
    Traceback (most recent call last):
    dynlora_lab.tasks.typed_fields.RecipeError: unknown field 'rat'; did you mean 'rate'?
    """
    checked = check_values(cls, values, section=section, refused=refused)
    required = {
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]  # cls is a dataclass
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(checked))
    if missing:
        raise RecipeError(f"field {section + missing[0]!r} is missing; add it to the recipe.")
    try:
        return cls(**checked)
    except ValueError as error:
        raise RecipeError(f"{section}{error}") from error


def check_values(
    cls: type, values: Mapping[str, Any], *, section: str = "", refused: Mapping[str, str] = {}
) -> dict[str, Any]:
    """``values`` with each one checked against, and converted to, its field's type in ``cls``.

    The dataclass itself is not built, so that its ``__post_init__`` need not be harmless.

    Args:
        cls: a dataclass.
        values: field name to value.
        section: prefix of the field names in messages.
        refused: fields that may not be given, with the way out.

    Raises:
        RecipeError: a field is unknown, refused or has a wrong type.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{section.rstrip('.') or 'the recipe'} is {values!r}; write fields below it, one a line."
        )
    types = field_types(cls)
    checked = {}
    for name, value in values.items():
        if name in refused:
            raise RecipeError(f"field {section + name!r} may not be given: {refused[name]}.")
        if name not in types:
            raise RecipeError(unknown_name("field", str(name), types, section=section))
        checked[name] = _converted(section + name, value, types[name])
    return checked


def field_types(cls: type) -> dict[str, Any]:
    """Type by name, of the fields that the constructor of a dataclass takes."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def unknown_name(kind: str, name: str, known: Iterable[str], *, section: str = "") -> str:
    """The message for a name that nobody knows, with the nearest one that is known.

    >>> unknown_name("field", "lerning_rate", ["seed", "learning_rate"], section="training.")
    "unknown field 'training.lerning_rate'; did you mean 'training.learning_rate'?"
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {section + near[0]!r}?"
    elif len(names := sorted(known)) <= MAX_LISTED:
        hint = f"known are {', '.join(names)}."
    else:
        hint = "no known one is near it; docs/train.md says where they are listed."
    return f"unknown {kind} {section + name!r}; {hint}"


def _converted(name: str, value: Any, wanted: Any) -> Any:
    if dataclasses.is_dataclass(wanted):  # a section, built and checked before
        return value
    adapter = TypeAdapter(wanted, config=_LENIENT)
    tried = [value]
    if isinstance(value, bool):
        tried.append("yes" if value else "no")  # YAML reads the words as true and false
    errors = []
    for candidate in tried:
        try:
            converted = adapter.validate_python(candidate)
        except ValidationError as error:
            errors.append(error)
            continue
        return converted.value if isinstance(converted, Enum) else converted
    first = errors[0].errors()[0]
    reason = first["msg"][:1].lower() + first["msg"][1:]
    raise RecipeError(f"field {name!r} is {value!r}: {reason}.") from errors[0]
