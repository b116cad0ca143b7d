"""Names in an adapter folder: its files, the keys of its tensors, and what its config says of a module.

Everything here takes plain data, so that a folder can be inspected without torch or PEFT.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

PREFIX = "base_model.model."
"""What PEFT puts before every module name in an adapter file."""

OUT_PROJECTION = ".base_layer.out_proj"
"""What follows the name of a MultiheadAttention in the name of its second adapted layer."""

PRUNED = "dynlora.pruned"
"""Entry of a weights file's metadata: names of pruned modules, a JSON list; what we write says so."""

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_"
    r"(?P<part>A\.weight|B\.weight|embedding_A|embedding_B|A\.c)"
)
_PARTS = {"A.weight": "A", "embedding_A": "A", "B.weight": "B", "embedding_B": "B", "A.c": "c"}

OLD_SCORES = (".lora_ema", ".lora_live")
"""Ends of entries by which earlier versions saved scores and masks of a gated adapter beside it."""

REWRITING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""``init_lora_weights`` by which PEFT changes the base's weights, again at each load, for these ranks."""

VARIANTS = {
    "use_dora": "the magnitude of weight-decomposed DoRA (NVIDIA) belongs to no component",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "block-diagonal LoRA has no rank-one components",
    "kasa_config": "KaSA trains singular values of its own and changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA replaces the backward pass of A",
    "arrow_config": "Arrow routes between finished adapters",
    "alora_invocation_tokens": "activated LoRA applies the adapter to a part of the tokens only",
    "layer_replication": "replicated layers share weights that would be pruned twice",
    "ensure_weight_tying": "tied factors belong to two modules at once",
}
"""Fields of LoraConfig with which an update is more than scaling · B A, or belongs to two, and why."""


@dataclass(frozen=True)
class FactorKey:
    """A tensor of an adapter file that belongs to the components of a module.

    Attributes:
        module: its name in the base model, ``.base_layer`` where PEFT nests its layers.
        part: A, B, or of a gated adapter c.
        is_embedding: whether the key is that of an Embedding's factor.
    """

    module: str
    part: str
    is_embedding: bool


def parse_key(key: str) -> FactorKey | None:
    """What a key of an adapter file says; None for a tensor beside the components.

    >>> parse_key("base_model.model.h.0.q_proj.lora_A.weight")
    FactorKey(module='h.0.q_proj', part='A', is_embedding=False)
    """
    match = _FACTOR.fullmatch(key)
    if match is None:
        return None
    return FactorKey(match["module"], _PARTS[match["part"]], match["part"].startswith("embedding_"))


def by_module(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys by module and part, in the order of the modules' names, and keys that belong to none."""
    modules: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        if (parsed := parse_key(key)) is None:
            others.append(key)
        else:
            modules.setdefault(parsed.module, {})[parsed.part] = key
    return dict(sorted(modules.items())), others


def factor_key(module: str, part: str, *, is_embedding: bool = False) -> str:
    """The key of a module's A or B.

    >>> factor_key("wte", "B", is_embedding=True)
    'base_model.model.wte.lora_embedding_B'
    """
    return f"{PREFIX}{module}.lora_" + (f"embedding_{part}" if is_embedding else f"{part}.weight")


def is_rewriting(start: object) -> bool:
    """Whether a value of ``init_lora_weights`` changes the base's weights, as ``pissa_niter_4`` does."""
    return isinstance(start, str) and start.startswith(REWRITING_STARTS)


def is_unknown_part(key: str) -> bool:
    """Whether a key belongs to LoRA components and yet has none of the parts above, as DoRA's magnitude.

    The bias of B (``lora_bias``) is known.
    """
    is_bias = key.endswith(".lora_B.bias")
    return ".lora_" in key and not is_bias and parse_key(key) is None


def group_of(module: str) -> str:
    """The module that a config can name: layers that PEFT nests in it share its rank and alpha.

    >>> group_of("attn.base_layer.out_proj"), group_of("mlp.experts.base_layer")
    ('attn', 'mlp.experts')
    """
    return module.split(".base_layer", maxsplit=1)[0]


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule for ``rank_pattern`` and ``alpha_pattern``: the first key that fits the end of the name.

    >>> by_pattern({"up": 2, "^h.0.down": 3}, "h.0.down", 8), by_pattern({"up": 2}, "h.0.up", 8)
    (3, 2)
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def with_dead_excluded(fields: dict[str, Any]) -> dict[str, Any]:
    """A config whose modules of rank 0 are excluded; gated ones once had rank 0 in ``rank_pattern``.

    >>> with_dead_excluded({"rank_pattern": {"^h.0.up": 0, "^h.0.down": 2}})
    {'rank_pattern': {'^h.0.down': 2}, 'alpha_pattern': {}, 'exclude_modules': 'h.0.up'}
    """
    pattern = fields.get("rank_pattern") or {}
    dead = [key.removeprefix("^") for key, rank in pattern.items() if rank == 0]
    if not dead:
        return fields
    excluded = fields.get("exclude_modules") or ()
    if not isinstance(excluded, str):
        excluded = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in excluded)
    alphas = fields.get("alpha_pattern") or {}
    return {
        **fields,
        "rank_pattern": {key: rank for key, rank in pattern.items() if rank != 0},
        "alpha_pattern": {key: a for key, a in alphas.items() if pattern.get(key) != 0},
        "exclude_modules": "|".join([excluded, *dead] if excluded else dead),
    }


def is_targeted(fields: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts the module: ``target_modules`` and ``exclude_modules``, not layer numbers."""
    excluded, targets = fields.get("exclude_modules"), fields.get("target_modules")
    if excluded and _means(excluded, name):
        return False
    return targets == "all-linear" or (targets is not None and _means(targets, name))


def _means(names: str | Iterable[str], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(f".{name}".endswith(f".{n}") for n in names)


def parameters_of(fields: Mapping[str, Any], group: str) -> tuple[str, ...]:
    """Names of the bare parameters of a module that ``target_parameters`` adapts, sorted."""
    found = set()
    for target in fields.get("target_parameters") or ():
        last = target.rpartition(".")[2]
        if f".{group}.{last}".endswith(f".{target}"):
            found.add(last)
    return tuple(sorted(found))


def ranks_in_config(fields: Mapping[str, Any], module: str) -> set[int]:
    """Ranks that the config gives a module: one, or one for each of its adapted parameters."""
    return {rank for rank, _ in _ranks_and_alphas(fields, module)}


def num_experts(fields: Mapping[str, Any], module: str, rows: int) -> int:
    """Experts that share one pair of factors: rows of A over the config's rank; 1 for other layers."""
    if not parameters_of(fields, group_of(module)):
        return 1
    return max(1, rows // max(1, *ranks_in_config(fields, module)))


def scaling_of(fields: Mapping[str, Any], module: str) -> float:
    """What PEFT multiplies B A by: alpha / r, or alpha / √r, with the patterns.

    Raises:
        ValueError: adapted parameters of one module have different scalings, which the file does not
            tell apart.
    """
    found = {
        float(alpha / (max(rank, 1) ** 0.5 if fields.get("use_rslora") else max(rank, 1)))
        for rank, alpha in _ranks_and_alphas(fields, module)
    }
    if len(found) > 1:
        raise ValueError(
            f"the parameters of module {module!r} have scalings {sorted(found)}; the file does not tell "
            "which factors belong to which. Give all parameters of a module one rank and one alpha."
        )
    return found.pop()


def _ranks_and_alphas(fields: Mapping[str, Any], module: str) -> list[tuple[int, float]]:
    group = group_of(module)
    names = [f"{group}.{p}" for p in parameters_of(fields, group)] or [group]
    return [
        (
            by_pattern(fields.get("rank_pattern"), name, fields.get("r", fields.get("init_r", 8))),
            by_pattern(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8)),
        )
        for name in names
    ]
