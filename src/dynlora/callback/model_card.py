"""The model card of a run: PEFT's own would be an empty template, and it keeps one that is there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dynlora.files import whole_file
from dynlora.lora.components import unwrapped

NAME = "README.md"
MARK = "<!-- Written by dynlora when training ended. It leaves a card without this line alone. -->"


def write_card(
    folder: Path,
    model: nn.Module,
    plan: Mapping[str, Any],
    ranks: Mapping[str, int],
    logs: list[Any],
) -> None:
    """Write ``README.md``, unless one is there that somebody else wrote.

    Args:
        folder: of the run; PEFT adds its metadata when it saves the adapter there.
        model: that was trained.
        plan: of the allocator, when the run began.
        ranks: final rank by module name.
        logs: what Trainer logged, each with its step.
    """
    path = folder / NAME
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return
    parts = ["---\nlibrary_name: peft\n---", *_head(unwrapped(model), plan, ranks), _scores(logs)]
    parts += [_loading(unwrapped(model)), _ranks(ranks)]
    with whole_file(path) as incoming:
        incoming.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _head(base: Any, plan: Mapping[str, Any], ranks: Mapping[str, int]) -> list[str]:
    sizes = plan["component_sizes"]
    before, after = (
        sum(rank * sizes[name] for name, rank in of.items()) for of in (plan["ranks"], ranks)
    )
    alive = sum(rank > 0 for rank in ranks.values())
    name = _name(base) or type(base).__name__
    return [
        f"# A LoRA of {name}",
        MARK,
        f"Trained with [dynlora](https://arxiv.org/abs/2405.17357): of {before:,} parameters {after:,} are "
        f"left, {sum(ranks.values()):,} rank-one components in {alive} of {len(ranks)} modules. It is a "
        "plain LoRA in which each module has a rank of its own.",
    ]


def _scores(logs: list[Any]) -> str:
    """The last evaluation, if there was one."""
    found = (entry for entry in reversed(logs) if "eval_loss" in entry)
    measured: dict[str, Any] = next(found, {})
    rows = [
        f"| {name.removeprefix('eval_')} | {value:.4g} |"
        for name, value in measured.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    ]
    head = f"| held-out, after step {measured.get('step')} | |\n|---|---|"
    return "\n".join([head, *rows]) if rows else ""


def _loading(base: Any) -> str:
    """Code that loads base and adapter; "" for a base that transformers does not know."""
    kind, name = type(base).__name__, _name(base)
    if not name or not type(base).__module__.startswith("transformers."):
        return ""
    head = f", num_labels={base.config.num_labels}" if kind.endswith("Classification") else ""
    return (
        "```python\n"
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{name}"{head})\n'
        'model = PeftModel.from_pretrained(base, "this-folder")\n'
        "```"
    )


def _ranks(ranks: Mapping[str, int]) -> str:
    return "\n".join(
        ["| module | rank |\n|---|---|", *(f"| {n} | {r} |" for n, r in ranks.items())]
    )


def _name(base: Any) -> str:
    return str(getattr(getattr(base, "config", None), "name_or_path", ""))
