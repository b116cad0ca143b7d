"""recipes/paper is the paper's Table 8, at both budgets, and every recipe file reads."""

import math
from pathlib import Path

import pytest

from dynlora_lab.tasks.recipe import read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"

# task: (length, learning rate, batch, epochs, DEM weight, prune interval), as printed in Table 8
TABLE_8 = {
    "rte": (128, 2e-3, 16, 80, 0.5, 10),
    "mrpc": (128, 2.5e-3, 16, 30, 0.3, 50),
    "stsb": (128, 3e-3, 16, 45, 0.3, 10),
    "cola": (128, 2e-3, 16, 45, 0.3, 10),
    "sst2": (128, 8e-4, 64, 60, 0.5, 10),
    "qnli": (128, 3.5e-3, 16, 12, 0.5, 50),
    "qqp": (128, 1e-3, 16, 10, 0.3, 50),
    "mnli": (128, 3e-3, 32, 10, 0.3, 50),
    "squad1": (384, 5e-3, 16, 14, 0.1, 100),
    "squad2": (384, 3.4e-3, 16, 14, 0.1, 100),
    "xsum": (768, 3.4e-3, 16, 15, 0.1, 100),
}
# the metrics of Table 2, first the one it shows
METRICS = {
    "stsb": ("pearson", "spearman"),
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
}


def folder_of(task):
    return RECIPES / "paper" / ("bart-base" if task == "xsum" else "roberta-base")


@pytest.mark.parametrize("task", TABLE_8)
@pytest.mark.parametrize(("suffix", "budget"), [("", 2), ("-r8", 8)])
def test_a_recipe_is_its_row_of_table_8(task, suffix, budget):
    recipe = read_recipe(folder_of(task) / f"{task}{suffix}.yaml")
    options, training, adapter = recipe.options, recipe.training, recipe.adapter
    length = options.max_source_length if task == "xsum" else options.max_length
    row = (
        length,
        training["learning_rate"],
        training["per_device_train_batch_size"],
        training["num_train_epochs"],
        adapter.dem_weight,
        adapter.prune_interval,
    )
    assert row == TABLE_8[task]
    assert adapter.target_r == budget
    assert adapter.init_r == math.ceil(1.5 * budget)
    assert adapter.lora_alpha / budget == pytest.approx(8 / adapter.init_r, rel=1e-4)
    assert (adapter.budget, adapter.revival, adapter.init) == ("components", True, "kaiming")
    assert (adapter.prune_start, adapter.prune_end) == (0.15, 0.5)
    assert recipe.output.name == f"{task}{suffix}"
    assert len(adapter.target_modules) == 6


@pytest.mark.parametrize("task", ["rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli"])
def test_glue_recipes_have_the_customary_metrics_and_splits(task):
    recipe = read_recipe(folder_of(task) / f"{task}.yaml")
    assert recipe.options.scores == METRICS.get(task, ("accuracy",))
    assert recipe.options.is_regression is (task == "stsb")
    assert recipe.data.config == task
    both = {"matched": "validation_matched", "mismatched": "validation_mismatched"}
    assert recipe.data.evals == (both if task == "mnli" else "validation")


def test_there_is_one_file_a_row_and_budget():
    files = {p.relative_to(RECIPES / "paper") for p in (RECIPES / "paper").rglob("*.yaml")}
    assert len(files) == 2 * len(TABLE_8)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_file_reads(path):
    assert read_recipe(path).output.parts[0] == "runs"
