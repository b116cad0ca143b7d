"""The trained parameters of a model that PEFT knows nothing of, in one safetensors file."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from dynlora.files import whole_file

TRAINED_FILE = "trained_weights.safetensors"


def save_trained(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write every trainable parameter by name to ``trained_weights.safetensors`` in ``folder``."""
    path = Path(folder) / TRAINED_FILE
    trained = {
        name: p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    with whole_file(path) as incoming:
        save_file(trained, incoming, metadata={"format": "pt"})
    return path
