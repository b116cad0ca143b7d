"""Read a finished LoRA folder for shrinking: what is no plain LoRA is refused."""

from pathlib import Path

from dynlora.adapter_files import updates
from dynlora.adapter_files.folder import checked_source, read_config
from dynlora.errors import AdapterFileError


def read(folder: Path) -> updates.Adapter:
    """Read a folder that PEFT wrote for a plain LoRA.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        AdapterFileError: it is not a plain LoRA, is damaged, or holds tensors that are not understood.
    """
    method = read_config(checked_source(folder)).get("peft_type")
    if method == "DYNLORA":
        raise AdapterFileError(
            f"{folder} is a checkpoint with gates (peft_type DYNLORA). Make it a plain LoRA first: "
            f"dynlora export {folder}"
        )
    if method != "LORA":
        raise AdapterFileError(f"{folder} has peft_type {method!r}; only LORA can be shrunk.")
    adapter = updates.read(folder, allowed=("layer_replication",))
    updates.refuse_rewriting_start(adapter)
    return adapter
