"""The demo: a recipe like any other on labelled texts, whose adapter is then re-loaded elsewhere."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from dynlora_lab.tasks.assets import pretrained_encoder
from dynlora_lab.tasks.assets.catalogue import DEFAULT_ENCODER
from dynlora_lab.tasks.data import Splits
from dynlora_lab.tasks.labelled_texts import (
    Example,
    LabelledTexts,
    read_labelled_texts,
    shipped_sample,
)
from dynlora_lab.tasks.progress import Listener
from dynlora_lab.tasks.recipe import Recipe, recipe_from
from dynlora_lab.tasks.reload_check import LOGITS_TOLERANCE, Reload, compare_reloaded
from dynlora_lab.tasks.run import RunResult, run
from dynlora_lab.tasks.run_files import claim_folder, write_run

NUM_RELOAD_ROWS = 32
DEFAULT_MODEL = f"offline:{DEFAULT_ENCODER}"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What came out.

    Attributes:
        record: the content of ``run.json``.
        adapter_file: weights of adapter and head.
        reload: the adapter re-loaded with stock PEFT beside the trained one.
    """

    record: dict[str, Any]
    adapter_file: Path
    reload: Reload

    @property
    def adapter_bytes(self) -> int:
        """Size of the file."""
        return self.adapter_file.stat().st_size

    @property
    def accuracy_before(self) -> float:
        """Share of the held-out texts that the untrained head gets right."""
        return float(self.record["evaluations"][0]["eval_accuracy"])

    @property
    def accuracy_after(self) -> float:
        """The same after training."""
        return float(self.record["metrics"]["eval_accuracy"])

    @property
    def majority_accuracy(self) -> float:
        """The same of always answering the most frequent class."""
        return float(self.record["baselines"]["accuracy"])

    def failed_checks(self) -> list[str]:
        """One line for each promise that was not kept."""
        failures = []
        if not self.accuracy_after > self.majority_accuracy:
            failures.append(
                f"accuracy {self.accuracy_after:.3f} is not above {self.majority_accuracy:.3f}, that "
                "of always answering the most frequent class; train longer, or with another "
                "learning rate"
            )
        budget = self.record["budget"]
        adapter = self.record["recipe"]["adapter"]
        allowed = budget["parameters_start"] * adapter["target_r"] / adapter["init_r"]
        if budget["parameters_end"] > allowed:
            failures.append(
                f"{budget['parameters_end']:,} parameters are left where a LoRA of rank target_r has "
                f"{allowed:,.0f}"
            )
        if self.reload.second_look:
            failures.append(
                f"re-loaded with stock PEFT the logits differ by {self.reload.difference:.1e}, more "
                f"than {LOGITS_TOLERANCE:.0e}: {self.reload.second_look}"
            )
        return failures


def demo_recipe(
    *,
    output: Path,
    model: str | None,
    data: Path | None,
    init_r: int,
    target_r: float,
    epochs: float | None,
    max_steps: int | None,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> Recipe:
    """The demo as a recipe.

    Raises:
        ValueError: a number is out of its range, or the length of the run is not given once.
    """
    if (epochs is None) == (max_steps is None):
        raise ValueError(
            f"epochs={epochs}, max_steps={max_steps}: give one of the two, the length of the run."
        )
    _need_positive(
        epochs=epochs, max_steps=max_steps, learning_rate=learning_rate, batch_size=batch_size
    )
    length = {"max_steps": max_steps} if max_steps else {"num_train_epochs": epochs}
    return recipe_from(
        {
            "task": "text-classification",
            "model": model or DEFAULT_MODEL,
            "output": str(output),
            "seed": seed,
            "data": {"name": str(data) if data else "WordNet glosses"},
            "adapter": {
                "init_r": init_r,
                "target_r": target_r,
            },
            "training": {
                **length,
                "learning_rate": learning_rate,
                "per_device_train_batch_size": batch_size,
                "per_device_eval_batch_size": 2 * batch_size,
                "train_sampling_strategy": "group_by_length",
                "eval_strategy": "no",
                "save_strategy": "no",
            },
        }
    )


def run_demo(recipe: Recipe, *, data: Path | None, listener: Listener) -> DemoResult:
    """Train, measure, save and re-load in a process that cannot import dynlora.

    Args:
        recipe: of :func:`demo_recipe`.
        data: CSV file; None for the shipped sample.
        listener: who is told on the way.

    Raises:
        ValueError: settings or data are unfit, or the output folder holds something else.
        AssetError: the default encoder cannot be fetched.
        ReloadError: the saved adapter does not load with stock PEFT.
    """
    claim_folder(recipe.output, overwrite=True)
    texts = read_labelled_texts(data) if data else shipped_sample()
    named = None if recipe.model == DEFAULT_MODEL else recipe.model
    encoder = pretrained_encoder(named, announce=listener.announce)
    result = run(recipe, splits=splits_of(texts), overwrite=True, listener=listener)
    listener.announce("Re-loading the saved adapter with stock PEFT in a process without dynlora")
    reload = _reloaded(recipe, result, encoder)
    look = {"reload_second_look": asdict(reload.second_look)} if reload.second_look else {}
    write_run(recipe.output, {**result.record, "reload_difference": reload.difference, **look})
    return DemoResult(
        record=result.record,
        adapter_file=recipe.output / "adapter_model.safetensors",
        reload=reload,
    )


def _need_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be above 0.")


def _reloaded(recipe: Recipe, result: RunResult, encoder: str) -> Reload:
    rows = result.prepared.evals[""]
    some = [rows[i] for i in range(min(NUM_RELOAD_ROWS, len(rows)))]
    collated = result.prepared.collator(some)
    batch = {k: v for k, v in collated.items() if k != "labels"}
    return compare_reloaded(
        recipe.output,
        batch,
        base=encoder,
        pad_token_id=result.prepared.processor.pad_token_id,
        model=result.trainer.model,
    )


def splits_of(texts: LabelledTexts) -> Splits:
    """The texts as a run takes them, with a single set to measure on."""
    return Splits(train=_rows(texts.train), evals={"": _rows(texts.test)})


def _rows(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_dict(
        {"text": [e.text for e in examples], "label": [e.label for e in examples]}
    )
