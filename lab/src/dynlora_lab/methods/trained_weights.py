"""The trained parameters of a model that PEFT knows nothing of, in one safetensors file."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

TRAINED_FILE = "trained_weights.safetensors"


def save_trained(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write every trainable parameter by name to ``trained_weights.safetensors`` in ``folder``."""
    path = Path(folder) / TRAINED_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = {
        name: p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    temporary = path.with_suffix(".incoming")
    save_file(trained, temporary, metadata={"format": "pt"})
    temporary.replace(path)
    return path
