"""The two shapes of a plain LoRA: every module with its own rank, or all with one, padded with zeros."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from dynlora.export.source import PREFIX, PlainAdapter
from dynlora.gated.fold import padded
from dynlora.gated.layer import OUT_PROJECTION
from dynlora.lora.configs import module_key

PAD_STEPS = (8, 16, 32, 64, 128, 256, 512)
"""Ranks that servers with one rank an adapter take (vLLM's list of allowed maximum ranks, without 1
and 320; LoRAX and TGI want multiples of 8)."""

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

Plain = tuple[LoraConfig, dict[str, Tensor]]


def ragged(adapter: PlainAdapter, *, dtype: torch.dtype | None = None) -> Plain:
    """Each module with its own rank, scaling 1; modules of rank 0 are excluded.

    Args:
        adapter: what to write.
        dtype: of the factors; None keeps theirs.
    """
    ranks = {n: r for n, r in adapter.ranks.items() if not n.endswith(OUT_PROJECTION)}
    largest = max(ranks.values())
    pattern = {module_key(n): r for n, r in ranks.items() if 0 < r < largest}
    dead = [n for n, r in ranks.items() if r == 0]
    targets = _targets(adapter, [n for n, r in ranks.items() if r], excluded=dead)
    config = _config(adapter, rank=largest, pattern=pattern, **targets)
    return config, _named(adapter, adapter.factors, dtype)


def uniform(
    adapter: PlainAdapter,
    *,
    rank: int | None = None,
    shapes: Shapes | None = None,
    dtype: torch.dtype | None = None,
) -> Plain:
    """All modules with one rank, scaling 1, no patterns: zero components fill up, dead modules too.

    Args:
        adapter: what to write.
        rank: the common rank; None takes the next of ``PAD_STEPS``.
        shapes: weight shapes (in, ...) and (out, ...) of dead modules, where the adapter does not know
            them and no module of the same kind is alive.
        dtype: of the factors; None keeps theirs.

    Raises:
        ValueError: ``rank`` is below the largest rank, or the shape of a dead module is unknown.
    """
    largest = max(adapter.ranks.values())
    rank = padded_rank(largest) if rank is None else rank
    if rank < largest:
        raise ValueError(
            f"pad_to={rank} is below the largest rank of the adapter, {largest}: padding only adds zero "
            f"components. Take {padded_rank(largest)}, or 'auto'."
        )
    example = next(iter(adapter.factors.values()))[0]
    factors = {}
    for name in adapter.ranks:
        if name in adapter.factors:
            pair = adapter.factors[name]
        else:
            a_shape, b_shape = _shape_of(name, adapter, shapes or {})
            pair = (example.new_zeros(0, *a_shape), example.new_zeros(b_shape[0], 0, *b_shape[1:]))
        factors[name] = padded(*pair, rank)
    names = [n for n in factors if not n.endswith(OUT_PROJECTION)]
    config = _config(adapter, rank=rank, pattern={}, **_targets(adapter, names, excluded=[]))
    return config, _named(adapter, factors, dtype)


def padded_rank(largest: int) -> int:
    """The next of ``PAD_STEPS`` that holds ``largest``; beyond them the next multiple of 64.

    >>> [padded_rank(r) for r in (1, 8, 9, 600)]
    [8, 8, 16, 640]
    """
    return next((step for step in PAD_STEPS if step >= largest), -(-largest // 64) * 64)


def kind_of(name: str) -> str:
    """A module's name with the places in its lists blotted out: layers of one kind share it.

    The first of several stays, because stages of one model, as in a UNet, may differ in width.

    >>> kind_of("model.layers.11.mlp.fc1"), kind_of("down_blocks.1.attentions.0.to_q")
    ('model.layers.#.mlp.fc1', 'down_blocks.1.attentions.#.to_q')
    """
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    for i in places[1:] or places:
        parts[i] = "#"
    return ".".join(parts)


def _shape_of(
    name: str, adapter: PlainAdapter, shapes: Shapes
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if name in adapter.shapes:
        return adapter.shapes[name]
    alike = {
        (tuple(a.shape[1:]), (b.shape[0], *b.shape[2:]))
        for other, (a, b) in adapter.factors.items()
        if kind_of(other) == kind_of(name)
    }
    if len(alike) == 1:
        return alike.pop()
    if name in shapes:
        return shapes[name]
    raise ValueError(
        f"module {name!r} fell to rank 0 and no other module surely has its shape; name the base "
        "model's folder (base=..., --base) to pad it with zeros."
    )


def _config(
    adapter: PlainAdapter, *, rank: int, pattern: dict[str, int], **fields: Any
) -> LoraConfig:
    return LoraConfig(
        **adapter.fields
        | {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "use_rslora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }
        | fields
    )


def _targets(adapter: PlainAdapter, names: Iterable[str], *, excluded: list[str]) -> dict[str, Any]:
    """The trained list of target modules where it still says what is meant, else full names.

    Never a regular expression: some servers read lists only.
    """
    own = adapter.fields.get("target_modules")
    own_excluded = adapter.fields.get("exclude_modules")
    kept = {"layers_to_transform", "layers_pattern"}
    if not isinstance(own, str) and own and not isinstance(own_excluded, str):
        dead = set(adapter.dead)
        unused = sorted({*(n for n in own_excluded or () if n not in dead), *excluded})
        return {
            "target_modules": sorted({*own, *_uncovered(names, own)}),
            "exclude_modules": unused or None,
            **{name: adapter.fields.get(name) for name in kept},
        }
    return {
        "target_modules": sorted(names),
        "exclude_modules": excluded or None,
        **dict.fromkeys(kept),
    }


def _uncovered(names: Iterable[str], targets: Iterable[str]) -> set[str]:
    """Names that no entry of a list of targets means; PEFT compares whole ends of names."""
    ends = tuple(f".{target}" for target in targets)
    return {n for n in names if not f".{n}".endswith(ends)}


def _named(
    adapter: PlainAdapter,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Tensors by their key in an adapter file."""
    tensors = {key: _as(tensor, dtype) for key, tensor in adapter.others.items()}
    for name, pair in factors.items():
        embedding = name in adapter.embeddings
        parts = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        for part, factor in zip(parts, pair, strict=True):
            tensors[f"{PREFIX}{name}.lora_{part}"] = _as(factor, dtype)
    return tensors


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    return cast.contiguous()
