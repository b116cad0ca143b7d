"""Write a cut adapter: checked against what it should be, and there whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynlora.adapter_files.format import CONFIG_FILE, WEIGHTS_FILE
from dynlora.adapter_files.updates import stack
from dynlora.shrink.layout import Cut, Layout

TOLERANCE = 1e-6
"""Relative to each ΔW, for factors in float32; half precision adds its own rounding."""

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt",
)  # fmt: skip


def check_out(out: Path, folder: Path) -> None:
    """Look whether ``out`` can become the new folder.

    Raises:
        FileExistsError: something is there already.
    """
    if out.resolve() == folder.resolve():
        raise FileExistsError(f"out={str(out)!r} is the adapter itself; name another folder.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} exists already; name a new folder or remove it.")


def write(
    folder: Path, source: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Weights, config, and the tokenizer's files if there are any beside the source."""
    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, folder / file.name)


def read_config(folder: Path) -> LoraConfig:
    """The config as PEFT reads it."""
    return PeftConfig.from_pretrained(str(folder))


@torch.no_grad()
def verify(folder: Path, layout: Layout, cut: Cut) -> float:
    """Read the file back and compare every ΔW with the truncated one, and every other tensor.

    Returns:
        The largest relative difference of a ΔW, in the Frobenius norm.

    Raises:
        RuntimeError: a difference is beyond rounding, or a tensor is missing or too many.
    """
    written = load_file(folder / WEIGHTS_FILE)
    largest = 0.0
    for spectrum, mask, rank in zip(layout.spectra, cut, layout.ranks(cut), strict=True):
        if not rank:
            continue
        update = spectrum.update
        b, a = stack(written.pop(update.b_key), written.pop(update.a_key), update.num_experts)
        difference = spectrum.difference(mask, b, a)
        limit = max(TOLERANCE, 2 * torch.finfo(update.a.dtype).eps)
        if not difference <= limit:
            raise RuntimeError(
                f"verification failed: the update of module {update.name!r} read back differs by "
                f"{difference:.2g} of its norm, more than {limit:.2g}. Nothing was written."
            )
        largest = max(largest, difference)
    others = layout.adapter.others
    if written.keys() != others.keys() or any(
        not torch.equal(tensor, others[key]) for key, tensor in written.items()
    ):
        raise RuntimeError(
            "verification failed: tensors beside the LoRA read back are not those of the source. Nothing "
            "was written."
        )
    return largest
