"""``dynlora train``: what it prints, its exit codes, its modes."""

import json
import re

import pytest
import yaml
from transformers import Trainer
from typer.testing import CliRunner

from dynlora.cli.main import app
from dynlora_lab.cli import train as train_command
from dynlora_lab.tasks.interrupt import Interrupted
from tiny_classifier import save_encoder, save_texts


@pytest.fixture
def path(tmp_path):
    recipe = {
        "task": "text-classification",
        "model": save_encoder(tmp_path / "tiny"),
        "output": str(tmp_path / "out"),
        "data": {"name": str(save_texts(tmp_path / "texts.csv"))},
        "adapter": {"target_r": 2, "prune_interval": 2},
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
    assert events[-1]["budget"]["components_end"] == sum(events[-1]["ranks"].values())
    assert ran.stderr == ""


def test_quiet_mode_prints_nothing(path, tmp_path):
    ran = train(path, "--quiet", "--eval_strategy", "no")
    assert (ran.exit_code, ran.output) == (0, "")
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_dry_run_shows_recipe_schedule_and_sizes(path, tmp_path):
    ran = train(path, "--dry-run", "--max_steps", 100)
    assert ran.exit_code == 0, ran.output
    assert "target_r: 2.0" in ran.stdout
    assert re.search(r"budget +[\d,]+ parameters at the start", ran.stdout)
    assert re.search(r"[\d,]+ parameters after step 50", ran.stdout)
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


def test_a_run_that_diverges_is_one_line_and_exit_code_1(path, monkeypatch):
    def diverged(*_args, **_options):
        raise FloatingPointError("NaN or infinite gradient at step 8")

    monkeypatch.setattr(train_command, "run", diverged)
    ran = train(path)
    assert (ran.exit_code, ran.stderr) == (1, "dynlora: NaN or infinite gradient at step 8\n")


def test_ctrl_c_without_a_checkpoint_promises_nothing(path, monkeypatch):
    def stopped(*_args, **_options):
        raise Interrupted(7, has_checkpoint=False)

    monkeypatch.setattr(train_command, "run", stopped)
    ran = train(path)
    assert ran.exit_code == 130
    assert "stopped after step 7; this method cannot go on from a checkpoint." in ran.stderr


def test_a_method_without_ranks_tells_its_parameters_alone(path):
    ran = train(path, "--method", "bitfit", "--eval_strategy", "no")
    assert ran.exit_code == 0, ran.output
    assert re.search(r"^([\d,]+) -> \1 parameters *$", ran.stdout, re.MULTILINE)
    assert "12 steps in " in ran.stdout


def test_all_prunings_of_a_short_schedule_are_shown(path):
    text = train(path, "--dry-run", "--max_steps", 20).stdout
    planned = json_lines(train(path, "--dry-run", "--json", "--max_steps", 20).stdout)[0]
    assert 1 < len(planned["schedule"]) <= train_command.EVENTS_SHOWN
    for step, budget in planned["schedule"]:
        when = f"after step {step}" if step else "at the start"
        assert f"{budget:,} parameters {when}" in text


def test_a_quiet_dry_run_checks_and_prints_nothing(path):
    ran = train(path, "--dry-run", "--quiet")
    assert (ran.exit_code, ran.output) == (0, "")


def test_of_several_processes_the_first_alone_tells_and_writes(path, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda _trainer: False)
    monkeypatch.setenv("RANK", "1")
    ran = train(path, "--method", "houlsby", "--save_strategy", "no", "--eval_strategy", "no")
    assert (ran.exit_code, ran.output) == (0, "")
    assert [*(tmp_path / "out").glob("*")] == []


@pytest.mark.parametrize(
    ("given", "meant"), [("--dryrun", "--dry-run"), ("--dry_run", "--dry-run"), ("--re-sume", "--resume")]
)  # fmt: skip
def test_a_flag_without_its_hyphens_trains_nothing(path, tmp_path, given, meant):
    ran = train(path, given)
    assert (ran.exit_code, ran.stderr) == (
        2, f"dynlora: unknown option '{given}'; did you mean '{meant}'?\n"
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
