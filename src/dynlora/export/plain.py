"""Write an adapter as a plain PEFT LoRA folder: ragged ranks, scale 1 everywhere."""

import copy
import os
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dynlora.adapter_files.format import OUT_PROJECTION, PREFIX, factor_key, group_of, parse_key
from dynlora.allocator.processes import is_first_process
from dynlora.export.folder import checked_folder, write_adapter
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.configs import plain_config
from dynlora.gated.fold import fold_all
from dynlora.gated.layer import GatedComponents
from dynlora.lora.components import (
    Factor,
    LoraComponents,
    find_adapter,
    find_components,
    unwrapped,
    without_wrappers,
)
from dynlora.lora.configs import ragged_config, rewrites_base
from dynlora.lora.sharding import full_tensor
from dynlora.lora.zero import is_zero_parameter


def export_lora(model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """Write an adapter, in training or finished, as a plain LoRA that stock PEFT loads.

    Components that are exactly 0 are left out: those that were pruned and still have a place. The model
    is not changed. With several processes every one must call it (sharded weights are
    gathered), and the first one writes. Files are written to a temporary folder beside ``path`` and
    renamed, so an interrupted export never leaves a half-written adapter.

    Args:
        model: a model with a LoRA adapter, stock or gated, wrapped or not.
        path: folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to.
        adapter: which adapter; may be left out if there is only one candidate.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such adapter, or several to choose from.
        NotADirectoryError: ``path`` is a file.
    """
    folder = checked_folder(path)
    config, tensors = plain_lora(model, adapter)
    if is_first_process():
        written = {parsed.module for key in tensors if (parsed := parse_key(key))}
        write_adapter(folder, config.to_dict(), tensors, _pruned(model, adapter, written))
    return folder


@torch.no_grad()
def plain_lora(
    model: nn.Module, adapter: str | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """LoraConfig and tensors, named as in an adapter file, of a plain LoRA equal to the adapter.

    Trained heads, biases and token embeddings of the adapter are included as they are.
    """
    name, trained = find_adapter(model, adapter)
    modules = find_components(model, name)
    tensors = _adapter_tensors(model, name)
    if isinstance(trained, DynLoraConfig):
        config, tensors = _folded(model, trained, modules, tensors)
    elif rewrites_base(trained):
        config = copy.copy(trained)  # its shapes belong to the changed base weights
    else:
        config, tensors = _without_zeros(model, trained, modules, tensors)
    config.inference_mode = True
    return config, {  # copies: PEFT names one bias twice with bias="all", and files hold no aliases
        key: full_tensor(tensor).detach().cpu().contiguous().clone()
        for key, tensor in tensors.items()
    }


def _pruned(model: nn.Module, adapter: str | None, written: Collection[str]) -> list[str]:
    """Modules of the adapter without tensors, and LoRA layers that no adapter is left in."""
    name, _ = find_adapter(model, adapter)
    found = {m.path for m in find_components(model, name)}
    for path, layer in unwrapped(model).named_modules():
        if isinstance(layer, LoraLayer) and not (layer.lora_A or layer.lora_embedding_A):
            found.add(without_wrappers(path))
    return sorted({group_of(path) for path in found} - {group_of(path) for path in written})


def _folded(
    model: nn.Module,
    trained: DynLoraConfig,
    modules: list[LoraComponents],
    tensors: dict[str, Tensor],
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A gated adapter as a plain one."""
    layers = [m for m in modules if isinstance(m, GatedComponents)]
    folded = fold_all(layers)
    ranks = {m.name: folded[m.name][0].shape[0] if m.name in folded else 0 for m in layers}
    config = plain_config(model, trained, ranks)
    own = tuple(f"{PREFIX}{name}.lora_" for name in ranks)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(own)}
    embeddings = {m.name for m in layers if hasattr(m.layer, "lora_c")}
    for name in (n for n, r in ranks.items() if r):
        for part, factor in zip("AB", folded[name], strict=True):
            tensors[factor_key(name, part, is_embedding=name in embeddings)] = factor
    return config, tensors


def _without_zeros(
    model: nn.Module,
    trained: LoraConfig,
    modules: list[LoraComponents],
    tensors: dict[str, Tensor],
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A stock adapter without the components that are exactly 0, unless all of them are."""
    kept = {m.name: _nonzero(m) for m in modules}
    if not any(len(places) for places in kept.values()):  # as LoRA starts
        kept = {m.name: torch.arange(m.rank) for m in modules}
    for module in modules:
        if len(kept[module.name]) == 0 and not module.can_drop:
            kept[module.name] = torch.zeros(1, dtype=torch.int64)
        for key, factor in _keys(module).items():
            tensor = full_tensor(tensors.pop(key)).detach().cpu()
            if len(kept[module.name]):
                places = factor.positions(kept[module.name])
                tensors[key] = tensor.index_select(factor.dim, places)
    ranks = {name: len(places) for name, places in kept.items()}
    return ragged_config(model, trained, modules, ranks), tensors


def _nonzero(module: LoraComponents) -> Tensor:
    """Indices of the components that contribute something, (kept,)."""
    found = torch.zeros(module.rank, dtype=torch.bool)
    for factor in module.switches:
        vectors = factor.vectors(full_tensor(factor.parameter).detach())
        found |= vectors.ne(0).any(2).any(0).cpu()
    return found.nonzero().flatten()


def _keys(module: LoraComponents) -> dict[str, Factor]:
    """The module's factors by their key in an adapter file."""
    names = (module.path, module.path + OUT_PROJECTION)
    keys = {}
    for name, (a, b) in zip(names, module.pairs, strict=False):
        for factor in (a, b):
            attribute = f".{factor.attribute}" if factor.attribute else ""
            keys[f"{PREFIX}{name}.{factor.container}{attribute}"] = factor
    return keys


def _adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    holder = next((m for m in model.modules() if isinstance(m, PeftModel)), unwrapped(model))
    named = [*holder.named_parameters(remove_duplicate=False), *holder.named_buffers()]
    if any(is_zero_parameter(p) for _, p in named):  # state_dict() would hold parts of them
        state = {without_wrappers(name): tensor for name, tensor in named}
        tensors = get_peft_model_state_dict(holder, state_dict=state, adapter_name=adapter)
    else:
        tensors = get_peft_model_state_dict(holder, adapter_name=adapter)
    return {k if k.startswith(PREFIX) else PREFIX + k: v for k, v in tensors.items()}
