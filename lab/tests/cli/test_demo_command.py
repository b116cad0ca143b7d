"""The lab's verbs: help, one-line errors, exit codes, and a whole demo on a tiny model."""

import json
import os
import sys

import pytest
from peft import PeftConfig
from rich.console import Console
from typer.testing import CliRunner

from dynlora.cli.main import app
from dynlora_lab.cli import demo as demo_command
from dynlora_lab.tasks import reload_check
from dynlora_lab.tasks.demo_run import DemoResult
from dynlora_lab.tasks.reload_check import Reload, ReloadError, SecondLook
from dynlora_lab.tasks.run_files import RUN_FILE
from tiny_classifier import save_encoder, save_texts


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def demo(tmp_path, *arguments):
    return invoke("demo", "--output", tmp_path / "out", *arguments)


@pytest.fixture
def inputs(tmp_path):
    model, data = save_encoder(tmp_path / "tiny"), save_texts(tmp_path / "texts.csv")
    return ["--model", model, "--data", data]


def result_in(folder, *, after=0.9, parameters=400, reload=None):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"weights")
    return DemoResult(
        record={
            "recipe": {"adapter": {"init_r": 3, "target_r": 2}},
            "evaluations": [{"step": 0, "eval_accuracy": 0.4}],
            "metrics": {"eval_accuracy": after},
            "baselines": {"accuracy": 0.5},
            "ranks": {
                "bert.encoder.layer.0.output.dense": 3,
                "bert.encoder.layer.1.output.dense": 1,
            },
            "budget": {
                "modules": 2,
                "components_start": 6,
                "components_end": 4,
                "parameters_start": 600,
                "parameters_end": parameters,
            },
            "steps": 10,
            "train_s": 1.0,
        },
        adapter_file=weights,
        reload=reload or Reload(difference=0.0),
    )


def test_a_whole_demo_on_a_tiny_model(tmp_path, inputs):
    ran = demo(tmp_path, *inputs, "--max-steps", 48, "--batch-size", 8)
    assert ran.exit_code == 0, ran.output
    assert "components 78 " in " ".join(ran.stdout.split())
    assert "max |Δ logits|" in ran.stdout
    assert ran.stderr == ""
    record = json.loads((tmp_path / "out" / RUN_FILE).read_text())
    sizes = record["budget"]
    assert 0.9 < sizes["parameters_end"] / (sizes["parameters_start"] * 4 / 6) <= 1
    assert record["reload_difference"] <= 1e-5
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"

    again = demo(tmp_path, *inputs, "--target-r", 7)  # the folder may be used again: no word of it
    assert again.exit_code == 2
    assert "target_r=7" in again.stderr


def test_an_adapter_with_emptied_modules_re_loads_to_the_bit(tmp_path, inputs, monkeypatch):
    real, answers = reload_check._reloaded, []

    def ask_one_process(*args, **options):
        if not answers:
            answers.append(real(*args, **options))
        return answers[0]

    monkeypatch.setattr(reload_check, "_reloaded", ask_one_process)
    monkeypatch.setattr(reload_check, "LOGITS_TOLERANCE", -1.0)  # look twice, whatever comes out
    demo(tmp_path, *inputs, "--max-steps", 12, "--batch-size", 8, "--target-r", 1)
    record = json.loads((tmp_path / "out" / RUN_FILE).read_text())
    assert 0 in record["ranks"].values()
    look = record["reload_second_look"]
    assert look["tensors"] == look["tensors_again"] == []
    assert look["trained_again"] == 0


def assert_one_line_error(ran, message, code=2):
    assert ran.exit_code == code
    assert message in ran.stderr
    assert ran.stderr.startswith("dynlora: ")
    assert ran.stderr.count("\n") == 1


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    for arguments, message in [
        (["--target-r", 9], "init_r=6 must be at least target_r=9.0"),
        (["--data", tmp_path / "absent.csv"], "absent.csv is not a file; give a CSV file"),
        (["--epochs", 1, "--max-steps", 5], "epochs=1.0, max_steps=5: give one of the two"),
        (["--max-steps", 0], "max_steps=0 must be above 0"),
        (["--learning-rate", -1], "learning_rate=-1.0 must be above 0"),
        (["--quick", "--epochs", 2], "--quick means --max-steps 60"),
    ]:
        assert_one_line_error(demo(tmp_path, *arguments), message)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_exist_is_a_mistake(tmp_path):
    data = save_texts(tmp_path / "texts.csv")
    ran = demo(tmp_path, "--model", tmp_path / "absent", "--data", data)
    assert_one_line_error(ran, "absent")


def test_foreign_output_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    ran = demo(tmp_path)
    assert_one_line_error(ran, f"is not empty and no run made it: there is no {RUN_FILE}")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    assert_one_line_error(invoke("demo", "--output", tmp_path / "file"), "is a file; name a folder")


def test_debug_shows_the_traceback(tmp_path):
    ran = demo(tmp_path, "--max-steps", 0, "--debug")
    assert isinstance(ran.exception, ValueError)
    assert ran.exit_code == 1


def test_a_failed_check_is_exit_code_1(tmp_path, monkeypatch):
    nan = float("nan")
    look = SecondLook(
        rows=(7,), tensors=(), tensors_again=(), trained_again=nan, reloaded_again=nan
    )
    reload = Reload(difference=nan, second_look=look)
    unkept = result_in(tmp_path, after=0.5, parameters=410, reload=reload)
    monkeypatch.setattr(demo_command, "run_demo", lambda *_, **__: unkept)
    ran = demo(tmp_path)
    assert ran.exit_code == 1
    lines = ran.stderr.splitlines()
    assert len(lines) == 3
    assert "accuracy 0.500 is not above 0.500" in lines[0]
    assert "410 parameters are left where a LoRA of rank target_r has 400" in lines[1]
    assert "logits differ by nan, more than 1e-05: rows 7; tensors that differ: none" in lines[2]
    assert "Final ranks" in ran.stdout


def test_a_failed_reload_is_exit_code_1(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise ReloadError("does not load")

    monkeypatch.setattr(demo_command, "run_demo", fail)
    assert_one_line_error(demo(tmp_path), "does not load", code=1)


def test_figures_fit_80_columns(tmp_path):
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(demo_command.result_view(result_in(tmp_path), width=80))
    text = captured.get()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "after training" in text
    assert "90.0%" in text
    assert "3 -> 2" in text


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["train", "--help"]])
def test_help_fits_80_columns(arguments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ran = invoke(*arguments)
    assert ran.exit_code == 0
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert "Fine-tune a" in ran.stdout


def test_bench_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "suite.yaml").write_text("name: x\n", encoding="utf8")
    for module in ("dynlora_lab.cli.bench", "dynlora_lab.bench.render", "dynlora_lab.bench.page"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = invoke("bench", tmp_path / "suite.yaml")
    assert_one_line_error(ran, "this needs matplotlib; pip install 'dynlora-lab[bench]'")


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_wait_without_spinning_unless_the_user_says_how(tmp_path, monkeypatch, chosen):
    seen = []

    def note(**_options):
        seen.append(os.environ["OMP_WAIT_POLICY"])
        return 0

    monkeypatch.setattr(demo_command, "demo", note)
    monkeypatch.setenv("OMP_WAIT_POLICY", chosen or "")  # undone after the test, whatever demo sets
    if chosen is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert demo(tmp_path).exit_code == 0
    assert seen == [chosen or "PASSIVE"]
