"""An adapter of a model, in training or finished, as a plain LoRA folder."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dynlora.adapter_files.format import PREFIX, by_module, group_of
from dynlora.adapter_files.updates import parsed
from dynlora.adapter_files.write import plain, write_adapter
from dynlora.allocator.processes import is_first_process
from dynlora.files import whole_folder
from dynlora.lora.components import find_adapter, find_components, unwrapped, without_wrappers
from dynlora.lora.configs import rewrites_base
from dynlora.lora.sharding import full_tensor, is_zero_parameter


def checked_folder(path: str | os.PathLike[str]) -> Path:
    """The path, unless a file has its name."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path={str(path)!r} is a file; name a folder to export to.")
    return folder


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
        ValueError: there is no such adapter, or several to choose from, or a gated one has no living
            component.
        NotADirectoryError: ``path`` is a file.
    """
    folder = checked_folder(path)
    name, _ = find_adapter(model, adapter)
    fields, tensors = _plain_lora(model, name)
    if is_first_process():
        adapted = {m.path for m in find_components(model, name)}
        for layer_path, layer in unwrapped(model).named_modules():
            if isinstance(layer, LoraLayer) and not (layer.lora_A or layer.lora_embedding_A):
                adapted.add(without_wrappers(layer_path))
        written = {group_of(module) for module in by_module(tensors)[0]}
        with whole_folder(folder) as temporary:
            write_adapter(temporary, fields, tensors, {group_of(m) for m in adapted} - written)
    return folder


@torch.no_grad()
def _plain_lora(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the config, and tensors as in an adapter file, of a plain LoRA equal to the adapter."""
    _, config = find_adapter(model, name)
    tensors = {  # copies: PEFT names one bias twice with bias="all", and files hold no aliases
        key: full_tensor(tensor).detach().cpu().contiguous().clone()
        for key, tensor in _adapter_tensors(model, name).items()
    }
    fields = config.to_dict() | {"inference_mode": True}
    if rewrites_base(config):  # its shapes belong to the changed base weights
        return fields, tensors
    adapter = parsed(fields, tensors, f"adapter {name!r}")
    if any(bool(update.contributing().any()) for update in adapter.updates):
        adapter = adapter.without_zeros()  # else it is untrained: B starts at 0
    return plain(adapter.unscaled() if adapter.is_gated else adapter)


def _adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    holder = next((m for m in model.modules() if isinstance(m, PeftModel)), unwrapped(model))
    named = [*holder.named_parameters(remove_duplicate=False), *holder.named_buffers()]
    if any(is_zero_parameter(p) for _, p in named):  # state_dict() would hold parts of them
        state = {without_wrappers(name): tensor for name, tensor in named}
        tensors = get_peft_model_state_dict(holder, state_dict=state, adapter_name=adapter)
    else:
        tensors = get_peft_model_state_dict(holder, adapter_name=adapter)
    return {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
