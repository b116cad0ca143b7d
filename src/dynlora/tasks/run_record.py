"""What goes into a run and what comes out, and the file that keeps both beside the adapter."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from dynlora.tasks.reload_check import LOGITS_TOLERANCE

RECORD_FILE = "run_record.json"  # also marks the folder as one that a further run may overwrite


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run needs to know; exactly one of ``epochs`` and ``max_steps`` is given."""

    output: Path
    model: str | None = None  # hub id or folder; None: the default encoder
    data: Path | None = None  # CSV file; None: the shipped sample
    init_r: int = 6
    target_r: float = 4
    epochs: float | None = None
    max_steps: int | None = None  # optimizer steps
    learning_rate: float = 1e-2
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what no other part checks.

        Raises:
            ValueError: a number is out of its range, or the length of the run is given twice.
        """
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"epochs={self.epochs}, max_steps={self.max_steps}: give one of the two, the length "
                "of the run."
            )
        for name in ("epochs", "max_steps", "learning_rate", "batch_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out; accuracies are shares of the held-out rows, in [0, 1]."""

    majority_accuracy: float
    accuracy_before: float
    accuracy_after: float
    ranks: dict[str, int]
    init_r: int
    components_start: int
    components_end: int
    components_target: int
    parameters_start: int  # of the adapter, without the head
    parameters_end: int
    adapter_file: str
    adapter_bytes: int  # the file: adapter and head
    reload_difference: float  # max |Δ logits|
    optimizer_steps: int
    train_s: float

    def failed_checks(self) -> list[str]:
        """One line for each promise that was not kept."""
        failures = []
        if not self.accuracy_after > self.majority_accuracy:
            failures.append(
                f"accuracy {self.accuracy_after:.3f} is not above {self.majority_accuracy:.3f}, that "
                "of always answering the most frequent class; train longer, or with another "
                "learning rate"
            )
        if self.components_end != self.components_target:
            failures.append(
                f"{self.components_end} components are left where target_r asks for "
                f"{self.components_target}"
            )
        if not self.reload_difference <= LOGITS_TOLERANCE:
            failures.append(
                f"re-loaded with stock PEFT the logits differ by {self.reload_difference:.1e}, more "
                f"than {LOGITS_TOLERANCE:.0e}"
            )
        return failures


def check_output(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier run of this kind.

    Raises:
        ValueError: ``folder`` is a file, or holds files that a run did not write.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --output.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD_FILE).is_file():
        raise ValueError(
            f"{folder} is not empty and holds no {RECORD_FILE}, so no earlier demo wrote it; name "
            "another folder with --output, or empty this one."
        )


def write_record(settings: RunSettings, result: RunResult | None) -> None:
    """Write settings and result as JSON into the output folder, which is made if need be.

    Without a result it claims the folder for a run that is about to begin.
    """
    content = {
        "settings": dataclasses.asdict(settings),
        "result": dataclasses.asdict(result) if result else None,
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / RECORD_FILE
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf8")
