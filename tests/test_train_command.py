"""``dynlora train``: what it prints, its exit codes, its modes."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from dynlora.cli import train as train_command
from dynlora.cli.main import app
from dynlora.tasks.interrupt import Interrupted
from tiny_classifier import save_encoder, save_texts


@pytest.fixture
def path(tmp_path):
    recipe = {
        "task": "text-classification",
        "model": save_encoder(tmp_path / "tiny"),
        "output": str(tmp_path / "out"),
        "data": {"name": str(save_texts(tmp_path / "texts.csv"))},
        "adapter": {"target_r": 2, "init_std": 0.02, "prune_interval": 2},
        "training": {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 0.01},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def train(path, *arguments):
    return CliRunner().invoke(app, ["train", str(path), *map(str, arguments)])


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_tells_people_what_it_does_and_what_came_out(path, tmp_path):
    ran = train(path, "--logging_steps", 4, "--eval_strategy", "no")
    assert ran.exit_code == 0, ran.output
    assert "40 rows to train on, 8 to measure on" in " ".join(ran.stderr.split())
    assert "step 0: loss" in ran.stderr
    assert "without a model  before   after" in ran.stdout
    assert "39 -> 26 components in 13 modules, mean rank 2" in ran.stdout
    assert max(map(len, ran.stdout.replace(str(tmp_path), "").splitlines())) <= 80

    again = train(path)
    assert again.exit_code == 2
    assert again.stderr.startswith("dynlora: output ")
    assert again.stderr.count("\n") == 1


def test_json_mode_prints_one_object_a_line_and_nothing_else(path):
    ran = train(path, "--json", "--eval_strategy", "no")
    assert ran.exit_code == 0, ran.output
    events = json_lines(ran.stdout)
    assert {e["event"] for e in events} == {"stage", "log", "result"}
    assert events[-1]["budget"]["components_end"] == 26
    assert ran.stderr == ""


def test_quiet_mode_prints_nothing(path, tmp_path):
    ran = train(path, "--quiet", "--eval_strategy", "no")
    assert (ran.exit_code, ran.output) == (0, "")
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_dry_run_shows_recipe_schedule_and_sizes(path, tmp_path):
    ran = train(path, "--dry-run", "--max_steps", 100)
    assert ran.exit_code == 0, ran.output
    assert "target_r: 2.0" in ran.stdout
    assert "26 components after step 50" in ran.stdout
    assert not (tmp_path / "out").exists()
    (planned,) = json_lines(train(path, "--dry-run", "--json").stdout)
    assert planned["steps"] == 12
    assert planned["recipe"]["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", 1], "did you mean '--learning_rate'?"),
        (["--label", "y"], "column 'y' is missing in train, found ['text', 'label']"),
        (["--resume"], "holds no run"),
        (["--eval_steps", "often"], "field 'training.eval_steps' is 'often'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(path, arguments, message):
    ran = train(path, *arguments)
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(path, monkeypatch):
    def stopped(*_args, **_options):
        raise Interrupted(7, has_checkpoint=True)

    monkeypatch.setattr(train_command, "run", stopped)
    ran = train(path, "--seed", 3)
    assert ran.exit_code == 130
    assert f"go on with: dynlora train {path} --seed 3 --resume" in ran.stderr


def test_debug_shows_the_traceback(path):
    ran = train(path, "--label", "y", "--debug")
    assert isinstance(ran.exception, ValueError)
