"""The trained parameters of a model that PEFT knows nothing of, in one safetensors file."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
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


def load_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put what :func:`save_trained` wrote into a model of the same structure, in place.

    Raises:
        ValueError: the file holds a parameter that the model lacks.
    """
    tensors = load_file(Path(folder) / TRAINED_FILE)
    _, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected:
        raise ValueError(
            f"folder={str(folder)!r} holds parameters that model={type(model).__name__} lacks, first "
            f"{unexpected[0]!r}: build the model, and its adapters, as for training."
        )
