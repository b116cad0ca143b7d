"""What a run's ranks say to the next one: a rank pattern for a plain LoRA."""

from collections.abc import Iterable, Mapping

from dynlora.report.layout import split_name


def mean_rank_by_kind(ranks: Mapping[str, int]) -> dict[str, float]:
    """Mean rank of each kind of module over its layers, highest first.

    >>> mean_rank_by_kind({"layers.0.mlp.up": 4, "layers.1.mlp.up": 1, "head": 3})
    {'head': 3.0, 'mlp.up': 2.5}
    """
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        parts = split_name(name)
        kinds.setdefault(parts[2] if parts else name, []).append(rank)
    means = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


def recommended_config(ranks: Mapping[str, int]) -> str:
    """Python for a LoraConfig with one rank a kind of module, as the run distributed its budget.

    Kinds whose mean rounds to 0 are left out. ``r`` is the most frequent rank; alpha is the rank in
    every module, so that the scaling is 1. PEFT compares ends of names, and the first pattern that fits
    counts: a kind that ends with another one's name stands before it.
    """
    rounded = {kind: round(mean) for kind, mean in mean_rank_by_kind(ranks).items()}
    kept = {kind: rank for kind, rank in rounded.items() if rank > 0}
    if not kept:
        return "# every kind of module has a mean rank below 0.5: a LoRA of rank 1 is too large"
    common = max(sorted(set(kept.values())), key=list(kept.values()).count)
    special = {kind for kind, rank in kept.items() if rank != common}
    shadowed = {kind for kind in kept if _ends_with_any(kind, special)}
    pattern = {k: kept[k] for k in sorted(special | shadowed, key=lambda k: (-len(k), k))}
    dropped = sorted(k for k, rank in rounded.items() if rank == 0 and _ends_with_any(k, kept))
    lines = [f"r={common},", f"lora_alpha={common},", *_listed("target_modules", sorted(kept))]
    if dropped:
        lines += _listed("exclude_modules", dropped)
    if pattern:
        lines += [*_mapped("rank_pattern", pattern), *_mapped("alpha_pattern", pattern)]
    return "\n".join(["LoraConfig(", *(f"    {line}" for line in lines), ")"])


def _ends_with_any(kind: str, others: Iterable[str]) -> bool:
    return any(kind.endswith(f".{other}") for other in others)


def _listed(name: str, values: Iterable[str]) -> list[str]:
    return [f"{name}=[", *(f"    {value!r}," for value in values), "],"]


def _mapped(name: str, values: Mapping[str, int]) -> list[str]:
    return [f"{name}={{", *(f"    {key!r}: {value}," for key, value in values.items()), "},"]
