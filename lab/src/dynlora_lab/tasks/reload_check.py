"""Does a saved adapter work without dynlora? Ask another process, with stock PEFT and nothing else."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynlora_lab.tasks.reload_child import tensor_digests

LOGITS_TOLERANCE = 1e-5  # float32, same machine: another order of summation, nothing more


class ReloadError(RuntimeError):
    """The other process could not load or run the adapter."""


@dataclass(frozen=True, kw_only=True)
class SecondLook:
    """What else is known of logits that differ; both models were asked twice.

    Attributes:
        rows: whose logits differed by more than the tolerance, by position in the batch.
        tensors: names of those that were not the same to the bit in the trained and the re-loaded model.
        tensors_again: the same for another process that re-loaded the adapter.
        trained_again: max |Δ logits| of the trained model's second answer from its first.
        reloaded_again: max |Δ logits| of the other process from the trained model's second answer.
    """

    rows: tuple[int, ...]
    tensors: tuple[str, ...]
    tensors_again: tuple[str, ...]
    trained_again: float
    reloaded_again: float

    def __str__(self) -> str:
        """In words, ending with what to do."""
        if self.tensors_again:
            end = "the folder and the base model do not give what was trained: please report this"
        elif self.tensors:
            end = (
                "one process had read or kept a wrong value, the saved adapter is right: run again"
            )
        elif self.reloaded_again <= LOGITS_TOLERANCE:
            end = "one process computed a wrong value, the saved adapter is right: run again"
        else:
            end = "equal weights compute different logits here: please report this"
        return (
            f"rows {_some(self.rows)}; tensors that differ: {_some(self.tensors)}; asked again, the "
            f"trained model's logits moved by {self.trained_again:.1e}, and those of the adapter "
            f"re-loaded once more differ by {self.reloaded_again:.1e} (tensors: "
            f"{_some(self.tensors_again)}); {end}"
        )


@dataclass(frozen=True, kw_only=True)
class Reload:
    """The re-loaded adapter beside the trained one.

    Attributes:
        difference: max |Δ logits|.
        second_look: None where the difference is within the tolerance.
    """

    difference: float
    second_look: SecondLook | None = None


def compare_reloaded(
    adapter: Path,
    batch: Mapping[str, Tensor],
    *,
    base: str,
    pad_token_id: int | None,
    model: nn.Module,
) -> Reload:
    """Compare the logits of the adapter re-loaded without dynlora with those of the trained model.

    A new process, in which ``import dynlora`` fails, draws a new head for the base model and loads
    the adapter on it with ``PeftModel.from_pretrained``.

    Args:
        adapter: folder with the saved adapter, which must include the head.
        batch: model inputs by name, each (rows, tokens).
        base: hub id or local folder of the base model.
        pad_token_id: of the tokenizer that padded ``batch``.
        model: the trained model; it stays on the CPU and in eval mode.

    Raises:
        ReloadError: the process failed; holds the last line it wrote.
    """
    trained = _logits_on_cpu(model, batch)
    metadata = {"num_labels": str(trained.shape[1]), "pad_token_id": str(pad_token_id)}
    reloaded, digests = _reloaded(adapter, batch, base=base, metadata=metadata)
    difference = _largest(reloaded - trained)
    if difference <= LOGITS_TOLERANCE:
        return Reload(difference=difference)
    again, digests_again = _reloaded(adapter, batch, base=base, metadata=metadata)
    trained_again = _logits_on_cpu(model, batch)
    by_row = (reloaded - trained).abs().amax(dim=1)
    held = tensor_digests(model)
    look = SecondLook(
        rows=tuple((~(by_row <= LOGITS_TOLERANCE)).nonzero().flatten().tolist()),
        tensors=_different(held, digests),
        tensors_again=_different(held, digests_again),
        trained_again=_largest(trained_again - trained),
        reloaded_again=_largest(again - trained_again),
    )
    return Reload(difference=difference, second_look=look)


def _logits_on_cpu(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits in eval mode, (rows, classes)."""
    model.to("cpu").eval()
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def _reloaded(
    adapter: Path, batch: Mapping[str, Tensor], *, base: str, metadata: Mapping[str, str]
) -> tuple[Tensor, dict[str, str]]:
    """Logits of the adapter in a new process, (rows, classes), and the digests of its tensors."""
    with tempfile.TemporaryDirectory() as scratch:
        batch_file, answer_file = Path(scratch) / "batch", Path(scratch) / "answer"
        tensors = {k: v.contiguous() for k, v in batch.items()}
        save_file(tensors, batch_file, metadata=dict(metadata))
        script = Path(__file__).with_name("reload_child.py")
        command = [sys.executable, script, base, adapter, batch_file, answer_file]
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
        with safe_open(answer_file, framework="pt") as answer:
            return answer.get_tensor("logits").clone(), answer.metadata()


def _largest(differences: Tensor) -> float:
    return float(differences.abs().max())


def _different(held: Mapping[str, str], reloaded: Mapping[str, str]) -> tuple[str, ...]:
    """Names whose digests differ, or that only one side has."""
    return tuple(sorted(n for n in {*held, *reloaded} if held.get(n) != reloaded.get(n)))


def _some(things: tuple[object, ...]) -> str:
    """The first three and how many there are, or "none"."""
    shown = ", ".join(str(thing) for thing in things[:3])
    return f"{shown} and {len(things) - 3} more" if len(things) > 3 else shown or "none"
