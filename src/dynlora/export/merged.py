"""Base weights plus update, shard by shard: never more than one tensor of the base in memory."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dynlora.export.base_files import INDEX, BaseFiles, NameMap, name_map
from dynlora.export.folder import whole_folder
from dynlora.export.source import PREFIX, PlainAdapter
from dynlora.export.stream import TensorSpec, write_tensors

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".index.json",
)

Updates = dict[str, tuple[Tensor, Tensor, bool]]
"""A, B and whether the module is an embedding, by tensor name."""


def write_merged(
    adapter: PlainAdapter,
    base: BaseFiles,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write the base model with the adapter's update and heads in its weights.

    Shards, names, dtypes and tied weights stay as in the base; sums are taken in fp32.

    Args:
        adapter: what to add.
        base: what to add it to.
        output: folder to write to, with the base's other files (config, tokenizer).
        dtype: of all floating-point weights; None keeps each tensor's own.
        labels: class names of a classifier's head, in its order; LABEL_0, … where they are not its number.

    Raises:
        ValueError: the base lacks a module's weight, its shape differs, or embeddings are tied.
    """
    _check_tied(adapter, base)
    rule, keys = name_map(adapter.factors, base)
    updates = {keys[n]: (a, b, n in adapter.embeddings) for n, (a, b) in adapter.factors.items()}
    heads = _heads(adapter, base, rule)
    new = {key: head for key, head in heads.items() if key not in base.shard_of}
    prefix = rule.removed if new else ""  # a head stands beside the model it belongs to
    shard_of: dict[str, str] = {}
    total = 0
    transposed = bool(adapter.fields.get("fan_in_fan_out"))
    with whole_folder(output) as temporary:
        for shard in base.shards:
            extra = new if shard == base.shards[-1] else {}
            specs = base.specs(shard) | {
                k: TensorSpec(tuple(t.shape), t.dtype) for k, t in extra.items()
            }
            specs = {k: TensorSpec(s.shape, _cast(s.dtype, dtype)) for k, s in specs.items()}
            named = {_prefixed(k, prefix, new): s for k, s in specs.items()}
            tensors = _merged(base, shard, updates, heads, transposed=transposed)
            cast = (
                (_prefixed(k, prefix, new), t.to(specs[k].dtype)) for k, t in _chain(tensors, extra)
            )
            write_tensors(temporary / shard, named, cast, base.metadata(shard))
            shard_of |= dict.fromkeys(named, shard)
            total += sum(spec.num_bytes for spec in named.values())
        _write_rest(base, temporary, shard_of, total, _config(base, adapter, heads, dtype, labels))


def _merged(
    base: BaseFiles, shard: str, updates: Updates, heads: dict[str, Tensor], *, transposed: bool
) -> Iterator[tuple[str, Tensor]]:
    with safe_open(base.folder / shard, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # no mapping
            if key in updates:
                a, b, embedding = updates[key]
                flip = embedding or transposed
                yield key, add_update(file.get_tensor(key), a, b, transposed=flip, key=key)
            else:
                yield key, heads[key] if key in heads else file.get_tensor(key)


def _chain(
    tensors: Iterator[tuple[str, Tensor]], extra: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    yield from tensors
    yield from extra.items()


def add_update(weight: Tensor, a: Tensor, b: Tensor, *, transposed: bool, key: str) -> Tensor:
    """W + B A in fp32 and then in W's dtype, as a new tensor.

    Args:
        weight: (out, in, ...), or its transpose as in embeddings and transformers' Conv1D.
        a: (rank, in, ...).
        b: (out, rank, ...).
        transposed: how to read a square weight; any other says it by its shape.
        key: name of the weight, for the error.

    Raises:
        ValueError: the shapes do not fit.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0], [100.0]])
    >>> add_update(torch.zeros(2, 3), a, b, transposed=False, key="w")
    tensor([[  1.,  10., 100.],
            [  2.,  20., 200.]])
    """
    out, inner = b.shape[0], a.flatten(1).shape[1]
    exact = torch.promote_types(weight.dtype, torch.float32)
    left, right = b.flatten(1).to(exact), a.flatten(1).to(exact)
    plain = (out, *a.shape[1:])
    square = weight.ndim == 2 and out == inner
    if weight.ndim == 2 and tuple(weight.shape) == (inner, out) and (transposed or not square):
        left, right = right.T, left.T
    elif tuple(weight.shape) != plain:
        raise ValueError(
            f"{key} has shape {tuple(weight.shape)} in the base model, its update has {plain}: this is not "
            "the adapter's base model, or a layer (grouped convolution) whose update is not B A."
        )
    merged = torch.addmm(weight.reshape(left.shape[0], -1).to(exact), left, right)
    return merged.to(weight.dtype).reshape(weight.shape)


def _heads(adapter: PlainAdapter, base: BaseFiles, rule: NameMap) -> dict[str, Tensor]:
    """Trained heads and biases by tensor name; the prefix rule is for what the base has."""
    heads = {}
    for stored, tensor in adapter.others.items():
        plain = stored.removeprefix(PREFIX)
        key = rule.key(plain, suffix="")
        heads[key if key in base.shard_of else plain.replace(".base_layer", "")] = tensor
    return heads


def _prefixed(key: str, prefix: str, new: dict[str, Tensor]) -> str:
    return key if key in new or key.startswith(prefix) else prefix + key


def _cast(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def _check_tied(adapter: PlainAdapter, base: BaseFiles) -> None:
    generates = str(adapter.fields.get("task_type")) in {"CAUSAL_LM", "SEQ_2_SEQ_LM"}
    tied = base.config.get("tie_word_embeddings", True)
    adapted = sorted(adapter.embeddings & set(adapter.factors))
    if adapted and generates and tied:
        raise ValueError(
            f"module {adapted[0]!r} shares its weight with the output layer (tie_word_embeddings), which "
            "merging would change too. Use --to ragged."
        )


def _config(
    base: BaseFiles,
    adapter: PlainAdapter,
    heads: dict[str, Tensor],
    dtype: torch.dtype | None,
    labels: Sequence[str],
) -> dict[str, Any]:
    """config.json of the merged model: dtype and, where a head was trained, its labels."""
    config = dict(base.config)
    if dtype is not None:
        config |= {"dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
    rows = {t.shape[0] for key, t in heads.items() if key.endswith(".weight") and t.ndim == 2}
    if rows and "CLS" in str(adapter.fields.get("task_type")):
        if len(labels) in rows:
            names = list(labels)
        elif len(config.get("id2label") or {}) in rows:
            return config
        else:
            names = [f"LABEL_{i}" for i in range(min(rows))]  # a dense layer before it is wider
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _write_rest(
    base: BaseFiles, folder: Path, shard_of: dict[str, str], total: int, config: dict[str, Any]
) -> None:
    for file in sorted(base.folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(base.shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
