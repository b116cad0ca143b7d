"""The README.md beside trained weights: base model, data, metrics, ranks, how to load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dynlora_lab.methods.trained_weights import TRAINED_FILE
from dynlora_lab.tasks.assets import find_asset
from dynlora_lab.tasks.recipe import Recipe
from dynlora_lab.tasks.whole_file import write_whole


def write_card(recipe: Recipe, record: Mapping[str, Any]) -> Path:
    """Write the model card of a finished run to ``README.md`` in its folder."""
    return write_whole(Path(recipe.output) / "README.md", card(recipe, record))


def card(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """The model card as Markdown with the hub's metadata on top.

    Args:
        recipe: of the run.
        record: its ``run.json``, status done.
    """
    metadata = {
        "base_model": _hub_name(recipe),
        "library_name": "peft" if _is_peft(recipe) else "transformers",
        "tags": list(dict.fromkeys(["dynlora", recipe.method, recipe.task])),
    }
    title = f"# {recipe.model} on {_data_name(recipe)}, by {recipe.method}"
    parts = [
        "---\n" + yaml.safe_dump(_without_none(metadata), sort_keys=False) + "---",
        title,
        f"Trained with [dynlora](https://arxiv.org/abs/2405.17357) {record['versions']['dynlora']}: "
        f"task `{recipe.task}`, method `{recipe.method}`, seed {recipe.seed}, {record['steps']} "
        f"optimizer steps on {record['data']['train_rows']} rows. `run.json` holds the whole recipe.",
        _metrics(record),
        _budget(record),
        "## Load\n\n```python\n" + _loading(recipe, record) + "```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metrics(record: Mapping[str, Any]) -> str:
    rows = [
        f"| {name.removeprefix('eval_')} | {value:.4f} |"
        for name, value in record["metrics"].items()
        if isinstance(value, float) and not name.endswith(("runtime", "_per_second"))
    ]
    known = [f"| {name}, without a model | {v:.4f} |" for name, v in record["baselines"].items()]
    return "\n".join(["## Metrics\n", "| held-out | |", "|---|---|", *rows, *known])


def _budget(record: Mapping[str, Any]) -> str:
    budget, ranks = record["budget"], record["ranks"]
    lines = [
        "## Size\n",
        f"{budget['parameters_end']:,} trained parameters beside the head "
        f"({budget['head_parameters']:,}); {budget['parameters_start']:,} at the start.",
    ]
    if ranks:
        lines += [
            "",
            f"{sum(ranks.values())} rank-one components in {len(ranks)} modules, mean rank "
            f"{sum(ranks.values()) / len(ranks):.3g}:",
            "",
            "| module | rank |",
            "|---|---|",
            *(f"| {name} | {rank} |" for name, rank in ranks.items()),
        ]
    return "\n".join(lines)


def _loading(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """Code that loads the model with transformers and PEFT alone; the reader may have no dynlora."""
    auto = recipe.family.auto_class
    if recipe.method == "full":
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("this-folder")\n'
    labels = record["data"].get("labels")
    head = ", num_labels=len(labels), id2label=dict(enumerate(labels))" if labels else ""
    base = f"labels = {labels!r}\n" if labels else ""
    if recipe.offline_name:
        base += f"# or the folder that this prints: dynlora assets fetch {recipe.offline_name}\n"
    known = _hub_name(recipe) or f"folder-of-{recipe.offline_name}"
    name = "base" if _is_peft(recipe) else "model"
    base += f'{name} = {auto}.from_pretrained("{known}"{head})\n'
    if _is_peft(recipe):
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n{base}"
            'model = PeftModel.from_pretrained(base, "this-folder")\n'
        )
    if recipe.method != "bitfit":
        base += (
            f"# add the adapters of {recipe.method} to model: the file holds weights, not modules\n"
        )
    return (
        f"from safetensors.torch import load_file\nfrom transformers import {auto}\n\n{base}"
        f'weights = load_file("this-folder/{TRAINED_FILE}")\n'
        "unknown = model.load_state_dict(weights, strict=False).unexpected_keys\n"
        "assert not unknown, unknown\n"
    )


def _hub_name(recipe: Recipe) -> str | None:
    """The base model as the hub knows it, None if it does not."""
    if not recipe.offline_name:
        return recipe.model
    copy = find_asset(recipe.offline_name).hub
    return copy.repository if copy else None


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _is_peft(recipe: Recipe) -> bool:
    return recipe.method not in ("full", "bitfit", "houlsby", "pfeiffer")


def _data_name(recipe: Recipe) -> str:
    return "/".join(filter(None, [recipe.data.name, recipe.data.config]))
