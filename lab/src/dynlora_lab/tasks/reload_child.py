"""Run as a script: load base model and adapter with stock PEFT, dynlora barred, and save logits.

Arguments: base model, adapter folder, file with the batch, file for the answer. The parent process is
:mod:`dynlora_lab.tasks.reload_check`.
"""

import hashlib
import sys
from typing import Any


def tensor_digests(model: Any) -> dict[str, str]:
    """SHA-256 of the values of every parameter and buffer that computes logits, by name.

    A base layer is named alike with and without an adapter around it. The head that PEFT keeps from
    before training computes nothing and is left out.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    return {
        name.replace(".base_layer.", "."): hashlib.sha256(_bytes(tensor)).hexdigest()
        for name, tensor in held
        if ".original_module." not in name
    }


def _bytes(tensor: Any) -> Any:
    """The values as bytes, whatever the dtype."""
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


def main(base: str, adapter: str, batch_file: str, answer_file: str) -> None:
    """Write the re-loaded model's logits on the batch, with the digests of its tensors as metadata.

    Raises:
        RuntimeError: dynlora can be imported here, so the outcome would prove nothing.
    """
    sys.modules["dynlora"] = None  # type: ignore[assignment]  # the import system reads None as "barred"
    try:
        import dynlora  # noqa: F401
    except ImportError:
        pass
    else:
        raise RuntimeError("dynlora could be imported in the process that must do without it")

    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification

    with safe_open(batch_file, framework="pt") as file:
        metadata = file.metadata()
    classifier = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=int(metadata["num_labels"]),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )
    classifier.config.pad_token_id = int(metadata["pad_token_id"])
    model = PeftModel.from_pretrained(classifier, adapter).eval()
    with torch.no_grad():
        logits = model(**load_file(batch_file)).logits
    save_file({"logits": logits.contiguous()}, answer_file, metadata=tensor_digests(model))


if __name__ == "__main__":
    del sys.path[0]  # this folder: its files must not shadow other packages
    main(*sys.argv[1:])
