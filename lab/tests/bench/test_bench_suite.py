"""Suites: what they make of recipes, what they refuse, and results folders that belong to them."""

from pathlib import Path

import pytest
import yaml

from bench_results import cell, result, small_suite
from dynlora_lab.bench.quick import quick_suite
from dynlora_lab.bench.results import open_folder, read_results, read_suite_file, write_result
from dynlora_lab.bench.suite import Cell, read_suite
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.typed_fields import RecipeError

VALUES = {
    "name": "mine",
    "defaults": {
        "task": "text-classification",
        "model": "some/model",
        "data": {
            "name": "d.csv",
            "held_out": 0.1,
            "evals": {"validation": "held_out", "test": "test"},
        },
        "adapter": {"target_r": 2},
    },
    "tasks": {"short": {"options": {"max_length": 8}}},
    "methods": {
        "lora": {"method": "lora"},
        "ours": {"method": "dynlora", "adapter": {"importance": "norm"}},
    },
    "learning_rates": [0.01],
}


def written(tmp_path, **changed):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({**VALUES, **changed}, sort_keys=False), encoding="utf8")
    return path


def test_a_cells_recipe_is_defaults_then_task_then_method_then_cell(tmp_path):
    suite = read_suite(written(tmp_path))
    made = cell("short", "ours", 0.01, 3)
    recipe = recipe_from(suite.recipe(made, tmp_path / "out"))
    assert (recipe.model, recipe.method, recipe.seed) == ("some/model", "dynlora", 3)
    assert recipe.options.max_length == 8
    assert (recipe.adapter.target_r, recipe.adapter.importance) == (2, "norm")
    assert recipe.training == {"learning_rate": 0.01}


def test_a_task_may_start_from_a_recipe_file(tmp_path):
    recipe = {"task": "text-classification", "model": "from/file", "method": "full", "output": "x"}
    recipe |= {"data": {"name": "f.csv", "split_seed": 5}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf8")
    suite = read_suite(written(tmp_path, tasks={"t": {"recipe": "r.yaml"}}))
    made = recipe_from(suite.recipe(cell("t", "lora", 0.01, 0), tmp_path / "out"))
    assert (made.method, made.output, made.data.split_seed) == ("lora", tmp_path / "out", 5)
    assert (made.model, made.data.name) == ("some/model", "d.csv")  # defaults lie over the file


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metods": {}}, "unknown field 'metods'; did you mean 'methods'"),
        ({"baseline": "lola"}, "unknown baseline 'lola'; did you mean 'lora'"),
        ({"seeds": []}, "seeds is empty"),
        (
            {"methods": {"lora": {"method": "lora", "learning_rates": [0.1, 0.2]}}},
            "methods.lora.learning_rates=.* must hold 1 rates",
        ),
        (
            {"methods": {"lora": {"method": "lora", "ranks_of": "dynlra"}}},
            "unknown ranks_of 'dynlra'",
        ),
        ({"tasks": {"a--b": {}}}, "name 'a--b' must hold no '--'"),
        ({"report": ["validation"]}, "report=.* holds select='validation'"),
        ({"report": ["tset"]}, "task 'short': data.evals=.* has no set 'tset'"),
        ({"select": "held_out"}, "task 'short': data.evals=.* must begin with the set 'held_out'"),
        (
            {"methods": {"lora": {"method": "lora", "adapter": {"rank": 2}}}},
            "task 'short' with method 'lora': field 'adapter.rank' may not be given",
        ),
        ({"tasks": {"t": {"recipe": "none.yaml"}}}, "task 't': recipe .*none.yaml' cannot be read"),
    ],
)
def test_an_unfit_suite_is_refused_before_anything_runs(tmp_path, changed, message):
    with pytest.raises(RecipeError, match=message):
        read_suite(written(tmp_path, **changed))


def test_a_missing_suite_is_said_to_be_missing(tmp_path):
    with pytest.raises(RecipeError, match="is not a file"):
        read_suite(tmp_path / "none.yaml")


def test_a_folder_keeps_its_suite_and_takes_more_seeds_and_methods(tmp_path):
    open_folder(tmp_path, small_suite())
    more = small_suite(
        seeds=[0, 1, 2, 3],
        methods={"lora": {"method": "lora"}, "dynlora": {"method": "dynlora"}, "x": {"method": "full"}},
    )  # fmt: skip
    open_folder(tmp_path, more)
    assert read_suite_file(tmp_path) == more


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "other"}, "holds results of suite 'small'"),
        ({"methods": {"lora": {"method": "full"}}}, "this suite with another 'methods'"),
        ({"defaults": {"task": "seq2seq"}}, "this suite with another 'defaults'"),
    ],
)
def test_a_folder_refuses_cells_that_would_not_compare(tmp_path, changed, message):
    open_folder(tmp_path, small_suite())
    with pytest.raises(RecipeError, match=message):
        open_folder(tmp_path, small_suite(**changed))


def test_a_damaged_result_is_named(tmp_path):
    open_folder(tmp_path, small_suite())
    made = cell("a", "lora", 0.01, 0)
    write_result(tmp_path, made.key, result(made, 0.5))
    assert read_results(tmp_path)[made.key]["selected"]["final"] == 0.5
    (tmp_path / "cells" / "b--lora--lr0.01--seed0.json").write_text("{", encoding="utf8")
    with pytest.raises(RecipeError, match="seed0.json is no result"):
        read_results(tmp_path)


def test_cells_of_different_rates_have_different_names():
    keys = {Cell(task="a", method="b", learning_rate=r, seed=0).key for r in (1e-3, 1.5e-3, 1e-5)}
    assert len(keys) == 3


def test_the_quick_suite_is_the_same_every_time(tmp_path):
    first = quick_suite(tmp_path)
    weights = (tmp_path / "tiny-bert" / "model.safetensors").read_bytes()
    assert quick_suite(tmp_path) == first
    assert (tmp_path / "tiny-bert" / "model.safetensors").read_bytes() == weights


SUITES = sorted((Path(__file__).parents[2] / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_every_suite_that_we_ship_can_run(path):
    suite = read_suite(path)
    assert suite.name == path.stem
    for method, values in suite.published.get("values", {}).items():
        assert method in suite.methods
        assert set(values) <= set(suite.tasks)


AVERAGES = {
    "paper-glue": {"full": 85.41, "bitfit": 84.91, "houlsby": 85.30, "pfeiffer": 85.40,
                   "lora": 85.50, "adalora": 85.93, "dynlora": 86.38},
    "paper-glue-r8": {"full": 85.41, "bitfit": 84.91, "houlsby": 85.88, "pfeiffer": 86.03,
                      "lora": 86.13, "adalora": 86.38, "dynlora": 86.97},
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_the_published_numbers_have_the_published_averages(name):
    values = read_suite(Path(__file__).parents[2] / "suites" / f"{name}.yaml").published["values"]
    for method, average in AVERAGES[name].items():
        row = values[method].values()
        assert sum(row) / len(row) == pytest.approx(average, abs=0.011)


def test_the_papers_rates_lie_inside_the_sweep_of_their_task():
    for path in SUITES:
        if path.stem.startswith("paper"):
            suite = read_suite(path)
            for task, values in suite.tasks.items():
                theirs = values["training"]["learning_rate"]
                rates = suite.rates(task, next(iter(suite.methods)))
                factor = next(iter(suite.methods.values())).get("rate_factor", 1)
                assert min(rates) < theirs * factor < max(rates)
                assert any(r == pytest.approx(theirs * factor, rel=1e-3) for r in rates)


def test_a_method_may_be_tuned_over_rates_of_its_own():
    methods = {
        "lora": {"method": "lora"},
        "full": {"method": "full", "learning_rates": [2e-5, 1e-5]},
    }
    suite = small_suite(methods=methods)
    assert suite.rates("a", "full") == [1e-5, 2e-5]
    assert suite.rates("a", "lora") == [0.001, 0.01]
    cell = Cell(task="a", method="full", learning_rate=1e-5, seed=0)
    assert "learning_rates" not in suite.recipe(cell, Path("out"))
