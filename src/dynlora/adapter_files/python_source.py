"""A LoraConfig as Python, to be printed and pasted."""

from collections.abc import Mapping
from typing import Any

FILLED_IN = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config",
})  # fmt: skip
"""Fields of LoraConfig that PEFT fills in by itself."""


def as_python(fields: Mapping[str, Any]) -> str:
    """``LoraConfig(...)`` with one argument a line.

    >>> print(as_python({"r": 4, "target_modules": ["q"], "rank_pattern": {"q": 2}}))
    LoraConfig(
        r=4,
        target_modules=['q'],
        rank_pattern={
            'q': 2,
        },
    )
    """
    first = [n for n in ("task_type", "r", "lora_alpha") if n in fields]
    names = [*first, *(n for n in fields if n not in first)]
    lines = [f"    {name}={_literal(fields[name])}," for name in names]
    return "\n".join(["LoraConfig(", *lines, ")"])


def _literal(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "\n".join(["{", *(f"        {k!r}: {v!r}," for k, v in value.items()), "    }"])
    if isinstance(value, list) and len(repr(value)) > 50:
        return "\n".join(["[", *(f"        {v!r}," for v in value), "    ]"])
    return repr(value)
