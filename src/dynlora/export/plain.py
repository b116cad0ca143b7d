"""An adapter of a model, in training or finished, as a plain LoRA folder."""

import os
from pathlib import Path

from peft.tuners.lora import LoraLayer
from torch import nn

from dynlora.adapter_files.format import by_module, group_of
from dynlora.adapter_files.write import write_adapter
from dynlora.allocator.processes import is_first_process
from dynlora.files import whole_folder
from dynlora.lora.components import find_adapter, find_components, unwrapped, without_wrappers
from dynlora.lora.plain import plain_lora


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
    fields, tensors = plain_lora(model, name)
    if is_first_process():
        adapted = {m.path for m in find_components(model, name)}
        for layer_path, layer in unwrapped(model).named_modules():
            if isinstance(layer, LoraLayer) and not (layer.lora_A or layer.lora_embedding_A):
                adapted.add(without_wrappers(layer_path))
        written = {group_of(module) for module in by_module(tensors)[0]}
        with whole_folder(folder) as temporary:
            write_adapter(temporary, fields, tensors, {group_of(m) for m in adapted} - written)
    return folder
