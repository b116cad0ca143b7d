"""Does a saved adapter work without dynlora? Ask another process, with stock PEFT and nothing else."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LOGITS_TOLERANCE = 1e-5  # float32, same machine: another order of summation, nothing more


class ReloadError(RuntimeError):
    """The other process could not load or run the adapter."""


def logits_on_cpu(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits in eval mode, (rows, classes); the model stays on the CPU and in eval mode."""
    model.to("cpu").eval()
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def reload_difference(
    adapter: Path,
    batch: Mapping[str, Tensor],
    *,
    base: str,
    pad_token_id: int | None,
    expected: Tensor,
) -> float:
    """Largest absolute difference of the re-loaded adapter's logits from ``expected``.

    A new process, in which ``import dynlora`` fails, draws a new head for the base model and loads
    the adapter on it with ``PeftModel.from_pretrained``.

    Args:
        adapter: folder with the saved adapter, which must include the head.
        batch: model inputs by name, each (rows, tokens).
        base: hub id or local folder of the base model.
        pad_token_id: of the tokenizer that padded ``batch``.
        expected: logits of the trained model on ``batch``, (rows, classes).

    Raises:
        ReloadError: the process failed; holds the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        batch_file, logits_file = Path(scratch) / "batch", Path(scratch) / "logits"
        metadata = {"num_labels": str(expected.shape[1]), "pad_token_id": str(pad_token_id)}
        save_file({k: v.contiguous() for k, v in batch.items()}, batch_file, metadata=metadata)
        script = Path(__file__).with_name("reload_child.py")
        command = [sys.executable, script, base, adapter, batch_file, logits_file]
        done = subprocess.run(  # noqa: S603 (our own script, no shell)
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},  # the base model is on this machine by now
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ReloadError(f"{adapter} does not load with stock PEFT: {reason}")
        logits = load_file(logits_file)["logits"]
    return float((logits - expected).abs().max())
