"""The learning rate after the freeze."""

import pytest

from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run
from tiny_classifier import save_encoder, save_texts


def rates(tmp_path, **adapter):
    values = {
        "task": "text-classification",
        "model": save_encoder(tmp_path / "tiny"),
        "method": "dynlora",
        "output": str(tmp_path / f"out{adapter.get('rate_after', '')}"),
        "data": {"name": str(save_texts(tmp_path / "texts.csv"))},
        "adapter": {"target_r": 2, "prune_interval": 2, "prune_end": 0.5, **adapter},
        "training": {
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
    }
    history = run(recipe_from(values)).trainer.state.log_history
    return [entry["learning_rate"] for entry in history if "learning_rate" in entry]


def test_after_the_freeze_the_schedule_is_multiplied_once(tmp_path):
    plain, doubled = rates(tmp_path), rates(tmp_path, rate_after=2.0)
    ratios = [b / a for a, b in zip(plain, doubled, strict=True)]
    frozen = ratios.index(2.0)
    assert 0 < frozen < len(ratios)
    assert ratios[:frozen] == [1.0] * frozen
    assert ratios[frozen:] == pytest.approx([2.0] * (len(ratios) - frozen))
