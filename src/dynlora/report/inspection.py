"""What an adapter folder says of itself, from its config and its weights' header: no torch, no model."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.adapter_files.folder import (
    Header,
    checked_source,
    fault,
    pruned_modules,
    read_config,
    read_header,
)
from dynlora.adapter_files.format import (
    PREFIX,
    VARIANTS,
    WEIGHTS_FILE,
    by_module,
    group_of,
    is_rewriting,
    is_targeted,
    is_unknown_part,
    num_experts,
    parameters_of,
    scaling_of,
)
from dynlora.report.rank_map import group_by_stack

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter folder in figures.

    Attributes:
        folder: where it is.
        kind: "native" (dynlora, gates included), "plain LoRA" or another method's name.
        base_model: what it was trained on, as its config says.
        task_type: PEFT's, or None.
        ranks: stored rank by module name; zeros for modules that are known to be pruned.
        init_r, target_r: of a native adapter, else None.
        num_parameters: of the factors A and B.
        num_bytes: of the weights file.
        dtypes: of the factors.
        scales: smallest and largest scaling alpha / r of the modules.
        heads: tensors that belong to no LoRA: classifiers, trained biases.
        served_by: what reads the folder as it is; nothing where config and weights do not fit.
        note: why others do not, and the way out; empty if nothing is to be said.
    """

    folder: str
    kind: str
    base_model: str | None
    task_type: str | None
    ranks: dict[str, int]
    init_r: int | None
    target_r: float | None
    num_parameters: int
    num_bytes: int
    dtypes: list[str]
    scales: tuple[float, float]
    heads: int
    served_by: list[str]
    note: str


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterFacts:
    """Read what the folder says; of the weights the header alone.

    Args:
        path: folder of an adapter.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        AdapterFileError: config or weights are damaged.
    """
    folder = checked_source(Path(path))
    config = read_config(folder)
    header = read_header(folder / WEIGHTS_FILE)
    modules, others = by_module(header)
    stored = {name: _rank(keys, header, config, name) for name, keys in modules.items()}
    ranks = stored | dict.fromkeys(pruned_modules(folder, config, list(modules)), 0)
    factors = [header[keys[p]] for keys in modules.values() for p in ("A", "B") if p in keys]
    scales = [scaling_of(config, n) for n, rank in stored.items() if rank] or [0.0]
    problem = _problem(config, header) if _kind(config) == "plain LoRA" else ""
    heads = len(others)
    served_by, note = ([], problem) if problem else servers(config, ranks, scales, heads=heads)
    return AdapterFacts(
        folder=str(folder),
        kind=_kind(config),
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        ranks=dict(sorted(ranks.items())),
        init_r=config.get("init_r"),
        target_r=config.get("target_r"),
        num_parameters=sum(math.prod(shape) for shape, _ in factors),
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        dtypes=sorted({dtype for _, dtype in factors}),
        scales=(min(scales), max(scales)),
        heads=heads,
        served_by=served_by,
        note=note,
    )


def _kind(config: Mapping[str, Any]) -> str:
    method = str(config.get("peft_type"))
    return {"DYNLORA": "native", "LORA": "plain LoRA"}.get(method, method)


def servers(
    config: Mapping[str, Any], ranks: Mapping[str, int], scales: list[float], *, heads: int
) -> tuple[list[str], str]:
    """What reads an adapter as it is, and what the others need."""
    kind = _kind(config)
    if kind == "native":
        return ["PEFT with dynlora"], "a plain LoRA serves anywhere: dynlora export"
    if kind != "plain LoRA":
        return ["PEFT"], "only LoRA adapters can be exported"
    start = config.get("init_lora_weights")
    if used := [name for name in VARIANTS if config.get(name)]:
        why = f"{', '.join(used)} changes what the factors mean: dynlora export --to merged"
        return ["PEFT"], why
    if is_rewriting(start):
        why = f"{start} changes the base's weights at each load: dynlora export --to merged"
        return ["PEFT"], why
    if heads:
        return ["PEFT", "transformers"], (
            "vLLM and llama.cpp refuse what was trained beside the LoRA, such as a head; "
            "dynlora export --to merged puts it into the model"
        )
    everywhere = ["PEFT", "transformers", "vLLM"]
    one_scale = max(scales) - min(scales) < 1e-9
    alive = {rank for rank in ranks.values() if rank}
    if len(alive) > 1 or not one_scale or 0 in ranks.values():
        if one_scale and scales[0] == 1 and config.get("lora_alpha") == config.get("r"):
            everywhere.append("diffusers")
        why = "llama.cpp, SGLang, TGI, LoRAX and MLX want one rank: dynlora export --to uniform"
        return everywhere, why
    return _readers_of_one_rank(everywhere, next(iter(alive)), list(ranks))


def _readers_of_one_rank(
    everywhere: list[str], rank: int, names: list[str]
) -> tuple[list[str], str]:
    """All servers, but those that the modules or the rank do not suit."""
    readers, notes = [*everywhere, "llama.cpp"], []
    queries = {n[:-6] for n in names if n.endswith("q_proj")}
    if {n[:-6] for n in names if n.endswith(("k_proj", "v_proj"))} <= queries:
        readers.append("SGLang")
    else:
        notes.append("SGLang wants q_proj wherever k_proj or v_proj is adapted")
    stacks, _ = group_by_stack(dict.fromkeys(names, rank))
    if any(len(row) < len(stack.layers) for stack in stacks for row in stack.rows.values()):
        notes.append("TGI and LoRAX leave out a kind of module that one layer lacks")
    elif rank % 8:
        notes.append("TGI and LoRAX want a multiple of 8")
    else:
        readers += ["TGI", "LoRAX"]
    return readers, "; ".join(notes)


def _problem(config: Mapping[str, Any], header: Header) -> str:
    """Why PEFT would load the folder as something else, or not at all; empty if it loads right."""
    modules, _ = by_module(header)
    if not modules:
        return "holds no lora_A and lora_B: PEFT serves the base model"
    for key in header:
        if not key.startswith(PREFIX) or _WRAPPERS & set(key.split(".")):
            return (
                f"key {key!r} matches no module of PEFT's, which would serve the base model: names begin "
                f"with {PREFIX!r} and hold no wrapper. Save the unwrapped model again"
            )
        if is_unknown_part(key) and not any(config.get(name) for name in VARIANTS):
            return f"key {key!r} is unknown, and PEFT leaves it out"
    for group in map(group_of, modules):
        if not parameters_of(config, group) and not is_targeted(config, group):
            return f"module {group!r} does not match target_modules, so PEFT leaves its weights out"
    return fault(config, header)


def _rank(keys: Mapping[str, str], header: Header, config: Mapping[str, Any], name: str) -> int:
    key = keys.get("A")
    rows = header[key][0][0] if key and header[key][0] else 0
    return rows // num_experts(config, name, rows)
