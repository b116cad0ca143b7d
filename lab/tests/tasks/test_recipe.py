"""Recipes: YAML and overrides into checked fields; every mistake one line with a way out."""

import pytest
import yaml

from dynlora.allocation import Settings
from dynlora_lab.methods.options import NOT_OFFERED
from dynlora_lab.tasks.recipe import known_fields, read_recipe, recipe_from
from dynlora_lab.tasks.typed_fields import RecipeError

PLAIN = {
    "task": "text-classification",
    "model": "some/model",
    "output": "out",
    "data": {"name": "rows.csv"},
    "adapter": {"target_r": 2},
    "training": {"learning_rate": "1e-3", "num_train_epochs": 3},
}


def test_a_recipe_is_read_with_overrides_last(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    recipe = read_recipe(
        path, ["--seed", "3", "--training.learning_rate=2e-3", "--target-r", "4", "--label", "y"]
    )
    assert recipe.seed == 3
    assert recipe.training == {"learning_rate": 0.002, "num_train_epochs": 3.0}
    assert recipe.adapter.target_r == 4
    assert recipe.options.label == "y"


def test_a_resolved_recipe_reads_as_itself():
    recipe = recipe_from(PLAIN)
    assert recipe_from(recipe.to_dict()) == recipe
    assert yaml.safe_dump(recipe.to_dict()["training"])  # plain values only


def test_the_words_that_yaml_takes_for_truth_values_stay_words():
    recipe = recipe_from(PLAIN, ["--save_strategy", "no", "--eval_on_start", "no"])
    assert recipe.training["save_strategy"] == "no"
    assert recipe.training["eval_on_start"] is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--lerning_rate", "1"],
            "unknown option '--lerning_rate'; did you mean '--learning_rate'",
        ),
        (["--lr", "3"], "unknown option '--lr'; did you mean '--learning_rate'"),
        (["--training.sed", "1"], "unknown field 'training.sed'; did you mean 'training.seed'"),
        (["--training.seed", "1"], "may not be given: set the recipe's field seed"),
        (["--adapter.target_r", "many"], "field 'adapter.target_r' is 'many': input should be"),
        (["--adapter.target_r", "0"], "adapter.target_r=0.0 must be a number above 0"),
        (["--init_r", "1"], "adapter.init_r=1 must be at least target_r=2"),
        (["--method", "lro"], "unknown method 'lro'; did you mean 'lora'"),
        (["--task", "text-clasification"], "unknown task .* did you mean 'text-classification'"),
        (["--options.texts", "[a, b, c]"], "must name one column, or two for pairs"),
        (["--metrics", "[pearson]"], "'pearson', which does not fit is_regression=False"),
        (["--data.eval_share", "1"], "data.eval_share=1.0 must lie between 0 and 1"),
        (["--base.dtype", "int3"], "field 'base.dtype' is 'int3'"),
        (["--name", "x", "--seed"], "--seed has no value"),
        (["seed", "3"], "'seed' is out of place; write --field value"),
        (["--seed", "["], "cannot be read as YAML"),
        (["--data", "rows.csv"], "data is 'rows.csv'; write fields below it"),
        (["--data.xyz", "1"], r"unknown field 'data\.xyz'; known are config, eval_share, .*train"),
        (
            ["--adapter.r", "8"],
            r"field 'adapter\.r' may not be given: write target_r, the mean rank at the end, and init_r",
        ),
        (
            ["--use_rslora", "true"],
            r"adapter\.use_rslora=True is for method lora, and dynlora has none of it; choose method lora",
        ),
        (
            ["--method", "adalora", "--adapter.ranks", "{a: 1}"],
            r"adapter\.ranks=\{'a': 1\} is for method lora, and adalora has none of it",
        ),
        (
            ["--init_lora_weights", "pissa"],
            r"adapter\.init_lora_weights='pissa' is for method lora",
        ),
        (
            ["--method", "lora", "--init_lora_weights", "pisa"],
            "init_lora_weights='pisa' must be true, or one of eva, .* pissa or pissa_niter_N; for another",
        ),
        (["--init_lora_weights", "false"], "init_lora_weights=False must be true, or one of eva"),
        (["--loraplus_lr_ratio", "0.5"], "loraplus_lr_ratio=0.5 must be at least 1; LoRA"),
        (["--rate_after", "0"], "rate_after=0.0 must be above 0"),
        (
            ["--method", "lora", "--rate_after", "2"],
            r"adapter\.rate_after=2\.0 is for methods dynlora and dynlora-auto, and lora has no freeze",
        ),
        (
            ["--placement", "mlp"],
            "'adapter.placement' is 'mlp': input should be 'all', 'attention' or",
        ),
        (
            ["--placement", "attention", "--ranks", "{a: 1}"],
            "placement='attention' and ranks both say which modules are adapted; leave one",
        ),
        (
            ["--placement", "attention", "--use_rslora", "true"],
            "use_rslora=True scales by each module's own rank, .* multiply lora_alpha by the square root",
        ),
        (["--adapter.use_dora", "true"], "recipes do not offer this field of LoraConfig; leave it"),
        (["--adapter.xyz", "1"], r"unknown field 'adapter\.xyz'; known are bottleneck, budget"),
        (["--training.lr", "1"], r"'training\.lr' may not be given: it is called learning_rate"),
        (["--training.xyz", "1"], "unknown field 'training.xyz'; no known one is near it; docs/"),
    ],
)
def test_mistakes_name_the_field_the_rule_and_the_way_out(overrides, message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_from(PLAIN, overrides)
    assert "\n" not in str(caught.value)


def test_no_field_of_ours_is_refused_as_one_of_lora_config():
    assert not NOT_OFFERED.keys() & known_fields(recipe_from(PLAIN).family)["adapter"]


def test_a_name_that_two_sections_know_must_be_written_out():
    values = {**PLAIN, "options": {}}
    with pytest.raises(RecipeError, match=r"could mean --data\.revision and --base\.revision"):
        recipe_from(values, ["--revision", "main"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\n", "field 'task' is missing"),
        ("task: text-classification\nmodel: m\noutput: o\n", "field 'data.name' is missing"),
        ("task: text-classification\nmodle: m\n", "unknown field 'modle'; did you mean 'model'"),
        ("- a\n", "holds no fields"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_unfit_files_are_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is not a file; check its name"):
        read_recipe(tmp_path / "absent.yaml")


def test_auto_cuts_where_the_library_does_unless_a_recipe_says_otherwise():
    values = PLAIN | {"method": "dynlora-auto"}
    assert recipe_from(values).adapter.prune_end == Settings(target_r="auto").prune_end
    assert recipe_from(values | {"adapter": {"prune_end": 0.6}}).adapter.prune_end == 0.6
