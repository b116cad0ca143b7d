"""Write an adapter as a plain PEFT LoRA folder: ragged ranks, scale 1 everywhere."""

import copy
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from dynlora.adapter.components import configs_of, find_config, find_gated_layers, unwrapped
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.flat_shards import without_wrappers
from dynlora.adapter.fold import fold_all
from dynlora.adapter.patterns import plain_config
from dynlora.adapter.sharding import needs_full_gradient, whole
from dynlora.distributed import is_first_process
from dynlora.export.folder import checked_folder, write_adapter
from dynlora.export.source import PREFIX


def export_lora(model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """Write an adapter, in training or finalized, as a plain LoRA that stock PEFT loads.

    The model is not changed. With several processes every one must call it (sharded weights are
    gathered), and the first one writes. Files are written to a temporary folder beside ``path`` and
    renamed, so an interrupted export never leaves a half-written adapter.

    Args:
        model: a model with a DynLora adapter, or one that ``finalize_`` made a plain LoRA.
        path: folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to.
        adapter: which adapter; may be left out if there is only one candidate.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such adapter, or none of its components is alive.
        NotADirectoryError: ``path`` is a file.
    """
    folder = checked_folder(path)
    config, tensors = plain_lora(model, adapter)
    if is_first_process():
        write_adapter(folder, config, tensors)
    return folder


@torch.no_grad()
def plain_lora(
    model: nn.Module, adapter: str | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """LoraConfig and tensors, named as in an adapter file, of a plain LoRA equal to the adapter.

    Trained heads, biases and token embeddings of the adapter are included as they are.
    """
    finished = _finished_adapter(model, adapter)
    if finished is not None:
        config = copy.copy(configs_of(model)[finished])
        tensors = _adapter_tensors(model, finished)
    else:
        adapter, trained = find_config(model, adapter)
        layers = find_gated_layers(model, adapter)
        folded = fold_all(layers)
        ranks = {m.name: folded[m.name][0].shape[0] if m.name in folded else 0 for m in layers}
        config = plain_config(model, trained, ranks)
        tensors = {
            key: tensor
            for key, tensor in _adapter_tensors(model, adapter).items()
            if not key.startswith(tuple(f"{PREFIX}{name}.lora_" for name in ranks))
        }
        embeddings = {m.name for m in layers if hasattr(m.layer, "lora_c")}
        for name in (n for n, r in ranks.items() if r):
            keys = (
                ("embedding_A", "embedding_B") if name in embeddings else ("A.weight", "B.weight")
            )
            for key, factor in zip(keys, folded[name], strict=True):
                tensors[f"{PREFIX}{name}.lora_{key}"] = factor
    config.inference_mode = True
    return config, {
        key: whole(tensor).detach().cpu().contiguous() for key, tensor in tensors.items()
    }


def _finished_adapter(model: nn.Module, adapter: str | None) -> str | None:
    """Name of the plain LoRA to write, or None if the adapter is still gated."""
    configs = configs_of(model)
    gated = [n for n, c in configs.items() if isinstance(c, DynLoraConfig)]
    plain = [n for n, c in configs.items() if type(c) is LoraConfig]
    if adapter is not None:
        return adapter if adapter in plain else None
    return plain[0] if not gated and len(plain) == 1 else None


def _adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    holder = next((m for m in model.modules() if isinstance(m, PeftModel)), unwrapped(model))
    named = [*holder.named_parameters(remove_duplicate=False), *holder.named_buffers()]
    if any(needs_full_gradient(p) for _, p in named):  # state_dict() would hold parts of them
        state = {without_wrappers(name): tensor for name, tensor in named}
        tensors = get_peft_model_state_dict(holder, state_dict=state, adapter_name=adapter)
    else:
        tensors = get_peft_model_state_dict(holder, adapter_name=adapter)
    return {k if k.startswith(PREFIX) else PREFIX + k: v for k, v in tensors.items()}
