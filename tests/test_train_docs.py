"""docs/train.md: its recipe reads, its Python runs, its tables are complete."""

import re
from pathlib import Path

import yaml

from dynlora.methods import METHODS
from dynlora.tasks.family import FAMILIES
from dynlora.tasks.recipe import recipe_from
from tiny_classifier import save_encoder, save_texts

TEXT = (Path(__file__).parent.parent / "docs" / "train.md").read_text(encoding="utf8")


def fence(language):
    return re.search(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)[1]


def first_cells(heading):
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row)}


def test_the_tables_name_every_task_and_every_method():
    assert first_cells("Tasks") == set(FAMILIES)
    assert first_cells("Methods") == set(METHODS)


def test_the_recipe_is_one():
    recipe = recipe_from(yaml.safe_load(fence("yaml")))
    assert recipe.options.scores == ("matthews",)


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "task": "text-classification",
        "model": save_encoder(tmp_path / "tiny"),
        "output": "out",
        "data": {"name": str(save_texts(tmp_path / "texts.csv"))},
        "adapter": {"target_r": 2},
        "training": {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    exec(compile(fence("python"), "train.md", "exec"), {})  # noqa: S102 (our own page)
    assert "eval_accuracy" in capsys.readouterr().out
