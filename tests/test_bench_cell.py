"""From the record of a real run to the result of a cell."""

import json

import pytest

from bench_results import cell
from dynlora.bench.cell import cell_result
from dynlora.bench.quick import quick_suite
from dynlora.tasks.recipe import recipe_from
from dynlora.tasks.run import run
from dynlora.tasks.run_files import read_run


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Recipe and record of one cell of the quick suite."""
    folder = tmp_path_factory.mktemp("cell")
    suite = quick_suite(folder / "parts")
    values = suite.recipe(cell("short-glosses", "dynlora", 0.03, 0), folder / "run")
    values["data"]["max_train_rows"] = 128
    values["adapter"]["importance"] = "norm"
    recipe = recipe_from(values)
    run(recipe)
    return recipe, read_run(recipe.output)


def test_the_result_tells_choosing_and_reported_scores_apart(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test"])
    assert result["metric"] == "accuracy"
    assert result["is_better_higher"] is True
    assert result["selected"]["final"] == record["metrics"]["eval_validation_accuracy"]
    assert result["reported"]["final"] == record["metrics"]["eval_test_accuracy"]
    assert result["steps"] == 24
    assert result["budget"]["components_end"] == 2 * len(result["ranks"])
    json.dumps(result)


def test_the_best_epoch_is_chosen_on_the_selecting_set_within_the_budget(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test"])
    frozen = [e for e in result["curve"] if e["step"] >= 12]  # prune_end is half of the run
    assert result["selected"]["best"] == max(e["selected"] for e in frozen)
    at = next(e for e in frozen if e["step"] == result["best_step"])
    assert result["reported"]["best"] == at["reported"]


def test_several_reported_sets_are_averaged(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test", "validation"])
    both = (result["selected"]["final"] + record["metrics"]["eval_test_accuracy"]) / 2
    assert result["reported"]["final"] == pytest.approx(both)


def test_the_recipe_in_a_result_names_no_folder_of_the_run(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test"])
    assert "output" not in result["recipe"]
    assert result["recipe"]["adapter"]["importance"] == "norm"
