"""An adapter of a model as config and tensors of a plain LoRA equal to it, gates folded into B."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from dynlora.adapter_files.format import PREFIX
from dynlora.adapter_files.updates import parsed
from dynlora.adapter_files.write import plain
from dynlora.lora.components import find_adapter, unwrapped, without_wrappers
from dynlora.lora.configs import refuse_unsaved_biases, rewrites_base
from dynlora.lora.sharding import full_tensor, is_zero_parameter


@torch.no_grad()
def plain_lora(
    model: nn.Module, name: str, *, embeddings: bool | str = "auto"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the config, and tensors as in an adapter file, without components that are exactly 0.

    Every process of a sharded model must call it.

    Args:
        model: wrapped or not; it is not changed.
        name: of the adapter.
        embeddings: PEFT's ``save_embedding_layers``.

    Raises:
        ValueError: PEFT would leave trained biases out.
    """
    _, config = find_adapter(model, name)
    refuse_unsaved_biases(config)
    tensors = {  # copies: PEFT names one bias twice with bias="all", and files hold no aliases
        key: full_tensor(tensor).detach().cpu().contiguous().clone()
        for key, tensor in _adapter_tensors(model, name, embeddings).items()
    }
    fields = config.to_dict() | {"inference_mode": True}
    if rewrites_base(config):  # its shapes belong to the changed base weights
        return fields, tensors
    adapter = parsed(fields, tensors, f"adapter {name!r}")
    if any(bool(update.contributing().any()) for update in adapter.updates):
        adapter = adapter.without_zeros()  # else it is untrained: B starts at 0
    return plain(adapter.unscaled() if adapter.is_gated else adapter)


def _adapter_tensors(model: nn.Module, adapter: str, embeddings: bool | str) -> dict[str, Tensor]:
    holder = next((m for m in model.modules() if isinstance(m, PeftModel)), unwrapped(model))
    named = [*holder.named_parameters(remove_duplicate=False), *holder.named_buffers()]
    if any(is_zero_parameter(p) for _, p in named):  # state_dict() would hold parts of them
        state = {without_wrappers(name): tensor for name, tensor in named}
    else:
        state = None
    tensors = get_peft_model_state_dict(
        holder, state_dict=state, adapter_name=adapter, save_embedding_layers=embeddings
    )
    return {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
