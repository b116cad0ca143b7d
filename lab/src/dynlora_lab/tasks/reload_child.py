"""Run as a script: load base model and adapter with stock PEFT, dynlora barred, and save logits.

Arguments: base model, adapter folder, file with the batch, file for the logits. The parent process is
:mod:`dynlora_lab.tasks.reload_check`.
"""

import sys


def main(base: str, adapter: str, batch_file: str, logits_file: str) -> None:
    """Write the logits of the re-loaded model on the batch, both as safetensors.

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
    save_file({"logits": logits.contiguous()}, logits_file)


if __name__ == "__main__":
    del sys.path[0]  # this folder: its files must not shadow other packages
    main(*sys.argv[1:])
