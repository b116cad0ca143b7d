"""The paper's GLUE recipes on local files with the columns, features and splits of the real sets."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from dynlora_lab.tasks.plan import plan
from dynlora_lab.tasks.recipe import read_recipe
from dynlora_lab.tasks.run import run
from tiny_classifier import save_encoder

RECIPES = Path(__file__).parents[2] / "recipes" / "paper" / "roberta-base"

# text columns and class names as on the hub; no names: a number
LAYOUTS = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "stsb": (["sentence1", "sentence2"], []),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
}


def save_glue(folder, task):
    """Train and validation rows, and test rows whose labels are hidden as on the hub."""
    texts, names = LAYOUTS[task]
    label = ClassLabel(names=names) if names else Value("float32")
    features = Features(
        {**{t: Value("string") for t in texts}, "label": label, "idx": Value("int32")}
    )
    both = ("_matched", "_mismatched") if task == "mnli" else ("",)
    splits = ["train", *(f"{s}{end}" for s in ("validation", "test") for end in both)]
    folder.mkdir()
    for split in splits:
        rows = []
        for i in range(24 if split == "train" else 8):
            value = i % len(names) if names else 5 * (i % 3) / 2
            words = ("good film", "bad film", "poor film")[i % 3]
            hidden = -1 if split.startswith("test") else value
            rows.append({**dict.fromkeys(texts, words), "label": hidden, "idx": i})
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def glue_recipe(tmp_path, task, *overrides):
    local = {
        "data.name": save_glue(tmp_path / task, task),
        "data.config": "null",
        "model": save_encoder(tmp_path / "tiny"),
        "output": tmp_path / "out",
    }
    given = [part for name, value in local.items() for part in (f"--{name}", str(value))]
    return read_recipe(RECIPES / f"{task}.yaml", [*given, *overrides])


@pytest.mark.parametrize("task", LAYOUTS)
def test_every_recipe_is_planned_on_the_real_layout(tmp_path, task):
    foretold = plan(glue_recipe(tmp_path, task))
    recipe = foretold.recipe
    batch = recipe["training"]["per_device_train_batch_size"]
    per_epoch = -(-24 // batch)
    assert foretold.steps == per_epoch * recipe["training"]["num_train_epochs"]
    assert foretold.parameters["head"] == 17 * max(1, len(LAYOUTS[task][1]))
    assert foretold.schedule[-1][1] == 2 * 12
    both = {"matched": 8, "mismatched": 8}
    assert foretold.eval_rows == (both if task == "mnli" else {"": 8})


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("mnli", {"eval_matched_accuracy", "eval_mismatched_accuracy"}),
        ("stsb", {"eval_pearson", "eval_spearman"}),
        ("cola", {"eval_matthews"}),
        ("mrpc", {"eval_accuracy", "eval_f1"}),
    ],
)
def test_one_run_measures_what_the_paper_shows(tmp_path, task, metrics):
    record = run(glue_recipe(tmp_path, task, "--max_steps", "8", "--eval_strategy", "no")).record
    assert metrics <= set(record["metrics"])
    assert all(-1 <= record["metrics"][name] <= 1 for name in metrics)
    names = {
        m.split("_", 1)[1].removeprefix("matched_").removeprefix("mismatched_") for m in metrics
    }
    assert set(record["baselines"]) == names
    assert record["data"]["labels"] == (LAYOUTS[task][1] or None)


def test_the_hidden_labels_of_a_test_split_are_refused(tmp_path):
    recipe = glue_recipe(tmp_path, "cola", "--evals", "test")
    with pytest.raises(ValueError, match=r"row 1 of test\.parquet has the label -1"):
        plan(recipe)
