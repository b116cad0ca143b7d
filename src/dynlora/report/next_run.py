"""An adapter's ranks as the settings of a framework that builds the LoRA itself, for the next run.

What a framework calls a field of LoraConfig, and makes of it, is read from its public source: axolotl
0.19.0, LLaMA-Factory 0.9.5, ms-swift 4.6.0, kohya's sd-scripts of February 2026.
"""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dynlora.adapter_files.folder import read_config
from dynlora.adapter_files.format import group_of, is_targeted, parameters_of
from dynlora.adapter_files.plain_config import as_python, number, told_fields
from dynlora.report.inspection import inspect_adapter

Framework = Literal["peft", "axolotl", "llama-factory", "ms-swift", "kohya"]

_NAMES: dict[str, dict[str, str]] = {
    "axolotl": {
        "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "target_modules": "lora_target_modules", "target_parameters": "lora_target_parameters",
        "modules_to_save": "lora_modules_to_save", "fan_in_fan_out": "lora_fan_in_fan_out",
        "use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora",
        "init_lora_weights": "peft_init_lora_weights",
        "rank_pattern": "lora_rank_pattern", "alpha_pattern": "lora_alpha_pattern",
    },
    "llama-factory": {
        "r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "target_modules": "lora_target", "modules_to_save": "additional_target", "use_dora": "use_dora",
    },
    "ms-swift": {
        "r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "target_modules": "target_modules", "target_parameters": "target_parameters",
        "modules_to_save": "modules_to_save", "bias": "lora_bias", "init_lora_weights": "init_weights",
        "use_dora": "use_dora",
    },
    "kohya": {"r": "network_dim", "lora_alpha": "network_alpha"},
}  # fmt: skip
"""Its names for fields of LoraConfig; what has none here is left out, and a comment says so."""

_EXACTLY = "for exactly these ranks let it start from an untrained adapter: docs/rank-report.md"


def settings_for(framework: Framework, path: str | os.PathLike[str]) -> str:
    """What to paste so that the framework trains the ranks of an adapter, at the same alpha / r.

    "peft" gives ``LoraConfig(...)`` and "axolotl" YAML, both exact. The others have one rank and one
    alpha for all modules: they get the largest rank, as YAML (LLaMA-Factory) or arguments.

    Args:
        framework: one of ``Framework``.
        path: folder of a plain LoRA.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        AdapterFileError: config or weights are damaged.
        ValueError: not a plain LoRA, or one that cannot be told to the framework.
    """
    facts = inspect_adapter(path)
    if facts.kind != "plain LoRA":
        raise ValueError(
            f"{path} holds an adapter of the kind {facts.kind}, and only a plain LoRA has settings to "
            "print; of an adapter with gates, dynlora export writes one"
        )
    config = {"rank_pattern": {}, "alpha_pattern": {}, **read_config(Path(path))}
    if framework == "peft":
        return as_python(config)
    notes = []
    if framework != "axolotl":
        low, high = facts.scales
        if high - low > 1e-9:
            raise ValueError(
                f"modules have scalings from {low:g} to {high:g}, and {framework} has one alpha for all; "
                + _EXACTLY
            )
        rank = max(facts.ranks.values())
        config |= {"r": rank, "lora_alpha": number(high * rank), "use_rslora": False}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
        notes.append(f"One rank for all modules, the largest; {_EXACTLY}")
    alphas = [config["lora_alpha"], *config["alpha_pattern"].values()]
    broken = sorted({alpha for alpha in alphas if alpha != int(alpha)})
    if broken and framework in {"axolotl", "llama-factory"}:
        raise ValueError(
            f"{framework} takes whole numbers as alpha, and the scaling needs {broken}; {_EXACTLY}"
        )
    told, names = told_fields(_by_name(config, facts.ranks)), _NAMES[framework]
    if unknown := sorted(told.keys() - names.keys() - {"task_type"}):
        notes.append(f"Left out: {', '.join(unknown)}")
    told.setdefault("lora_dropout", 0.0)  # ms-swift has another default
    pairs = {name: told[field] for field, name in names.items() if field in told}
    write = _arguments if framework in {"ms-swift", "kohya"} else _yaml
    if framework == "llama-factory":
        pairs = {name: ",".join(v) if isinstance(v, list) else v for name, v in pairs.items()}
    return "\n".join([*(f"# {note}" for note in notes), write(pairs)])


def _by_name(config: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config with its targets as a list of names, and nothing excluded."""
    excluding = ("exclude_modules", "layers_to_transform", "layers_pattern")
    excludes = any(config.get(field) not in (None, []) for field in excluding)
    if not excludes and not isinstance(config.get("target_modules"), str):
        return config
    modules = {n for n in map(group_of, ranks) if not parameters_of(config, n)}
    alive = modules & {group_of(n) for n, rank in ranks.items() if rank}
    named = {**config, "target_modules": sorted(alive), **dict.fromkeys(excluding)}
    if wrong := sorted(n for n in modules - alive if is_targeted(named, n)):
        raise ValueError(
            f"a list of names cannot leave out {wrong[0]!r}, as PEFT compares their ends; {_EXACTLY}"
        )
    return named


def _yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, which reads strings as JSON writes them.

    >>> print(_yaml({"lora_r": 4, "lora_target_modules": ["q"], "lora_rank_pattern": {"^h": 2}}))
    lora_r: 4
    lora_target_modules:
      - "q"
    lora_rank_pattern:
      "^h": 2
    """
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows = [f"  {json.dumps(key)}: {json.dumps(part)}" for key, part in value.items()]
        elif isinstance(value, list):
            rows = [f"  - {json.dumps(part)}" for part in value]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
            continue
        lines += [f"{name}:", *rows]
    return "\n".join(lines)


def _arguments(settings: Mapping[str, Any]) -> str:
    """Settings as arguments of a command.

    >>> _arguments({"lora_rank": 4, "target_modules": ["q", "v"]})
    '--lora_rank 4 --target_modules q v'
    """
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(v) for v in values)]
    return shlex.join(words)
