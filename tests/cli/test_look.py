"""``dynlora export``, ``inspect``, ``report`` and ``watch``: output, exit codes, 80 columns."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dynlora.cli import look
from dynlora.cli.main import app
from dynlora.export import models
from dynlora.history import HistoryFile
from tiny_models import adapted, tiny_llama, train

COMMANDS = ["export", "inspect", "report", "watch"]


def write_run(folder, *, steps):
    """A history of two modules, one of which is emptied in the middle."""
    file = HistoryFile(folder)
    ranks = {"l.0.a": 4, "l.1.a": 4}
    start = {"event": "start", "step": 0, "ranks": ranks, "total_steps": steps, "schedule": []}
    file.append({**start, "time": 0.0, "component_sizes": {"l.0.a": 10, "l.1.a": 10}})
    for step in range(1, steps + 1):
        if step == steps // 2:
            after = ranks | {"l.1.a": 0}
            file.append(
                {
                    "event": "prune",
                    "step": step,
                    "time": 1.0,
                    "ranks": after,
                    "cut": 4,
                    "revived": 0,
                }
            )
        file.append({"event": "log", "step": step, "time": 1.0, "logs": {"loss": 1 / step}})
    file.append({"event": "end", "step": steps, "time": 2.0, "ranks": after})
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(root / "base")
    model = adapted(tiny_llama, gated=True, task_type="CAUSAL_LM")
    train(model, steps=12, total_steps=40)
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / "native")
    return root / "native"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_has_an_example_and_exit_codes(command):
    ran = invoke(command, "--help")
    assert ran.exit_code == 0
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert f"dynlora {command} " in ran.stdout
    assert "Exit code: 0" in ran.stdout


def test_help_names_every_command_and_shell_completion():
    text = invoke("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "--install-completion" in text


def test_export_writes_verifies_and_speaks_json(native, tmp_path):
    ran = invoke(
        "export", native, "--to", "uniform", "--output", tmp_path / "u", "--verify", "--json"
    )
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["max_rank"] == 8
    assert told["max_difference"] <= 1e-5
    assert told["num_bytes"] > told["source_bytes"]
    seen = invoke("inspect", tmp_path / "u")
    assert seen.exit_code == 0
    assert "8 in every module" in seen.stdout
    assert "of 8 at most" in seen.stdout  # a plain LoRA tells nothing of a start


@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_export_says_who_serves_what_it_wrote(native, tmp_path, form):
    ran = invoke("export", native, "--to", form, "--output", tmp_path / "out")
    if form == "uniform":
        assert " kB -> " in ran.stdout
        assert "every module padded to rank 8" in flat(ran.stdout)
    served = next(line for line in ran.stdout.splitlines() if line.startswith("Served by PEFT"))
    assert ("llama.cpp" in served) == (form == "uniform")


def test_export_that_differs_is_exit_code_1(native, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "TOLERANCE", -1.0)
    monkeypatch.setattr(torch, "finfo", lambda _dtype: SimpleNamespace(eps=-1.0))
    ran = invoke("export", native, "--output", tmp_path / "out", "--verify")
    assert ran.exit_code == 1
    assert "verification failed: what was written" in ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere"], "nowhere holds no adapter_config.json"),
        (["inspect", "nowhere"], "nowhere holds no adapter_config.json"),
        (["report", "nowhere"], "holds neither history.jsonl nor run.json"),
        (["watch", "nowhere"], "holds neither history.jsonl nor run.json"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_on_stderr_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = invoke(*arguments)
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("dynlora: ")
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []  # noqa: PTH208  # nothing was written
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    assert not isinstance(invoke(*arguments, "--debug").exception, SystemExit)


def test_inspect_prints_figures_and_json(native):
    ran = invoke("inspect", native)
    assert ran.exit_code == 0
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert "init_r 4, target_r 1" in ran.stdout
    assert json.loads(invoke("inspect", native, "--json").stdout)["kind"] == "native"


def test_inspect_prints_nothing_but_what_is_to_be_pasted(tmp_path):
    adapted(tiny_llama, target_modules=["q_proj"]).save_pretrained(tmp_path)
    ran = invoke("inspect", tmp_path, "--config-for", "axolotl")
    assert ran.stdout.splitlines() == [
        "lora_r: 4", "lora_alpha: 8", "lora_dropout: 0.0", "lora_target_modules:", '  - "q_proj"'
    ]  # fmt: skip
    assert invoke("inspect", tmp_path, "--config-for", "kohya").stdout.endswith("network_alpha 8\n")


def test_report_writes_the_page_beside_the_run_and_json(tmp_path):
    run = write_run(tmp_path / "run", steps=20)
    ran = invoke("report", run, "--picture", tmp_path / "r.svg")
    assert ran.exit_code == 0, ran.stderr
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.svg").exists()
    told = json.loads(invoke("report", run, "--terminal", "--json").stdout)
    assert told["written"] == []
    assert told["runs"][0]["ranks"] == {"l.0.a": 4, "l.1.a": 0}


def test_watch_shows_a_finished_run_and_ends(tmp_path):
    run = write_run(tmp_path / "run", steps=20)
    for arguments in ([run, "--once"], [run, "--every", "0.01"]):
        ran = invoke("watch", *arguments)
        assert ran.exit_code == 0
        assert "20 of 20 (finished)" in ran.stdout


@pytest.mark.parametrize("command", ["inspect", "report", "watch"])
def test_commands_that_read_files_do_not_wait_for_torch(native, tmp_path, command):
    target = native if command == "inspect" else write_run(tmp_path / "run", steps=10)
    more = ["--once"] if command == "watch" else []
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv[0] = 'dynlora'\n"
        "from dynlora.cli.main import main; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, command, str(target), *more],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "ranks" in ran.stdout or "components" in ran.stdout


def test_a_report_without_what_draws_it_says_what_to_install(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=10)
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "dynlora.report.page", raising=False)
    ran = invoke("report", run)
    assert ran.exit_code == 2
    assert ran.stderr == "dynlora: this needs jinja2; pip install 'dynlora[report]'\n"
    assert isinstance(invoke("report", run, "--debug").exception, ModuleNotFoundError)


def test_a_merged_export_names_no_servers_of_adapters(native, tmp_path):
    ran = invoke("export", native, "--to", "merged", "--output", tmp_path / "m")
    assert ran.exit_code == 0, ran.stderr
    assert flat(ran.stdout).startswith(f"Wrote {tmp_path / 'm'}: merged, ")
    assert "Against the source: max |Δ outputs|" in flat(ran.stdout)  # always, without being asked
    assert "Served by" not in ran.stdout


def test_a_merge_that_fails_its_check_is_exit_code_1(native, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "TOLERANCE", -1.0)
    monkeypatch.setattr(torch, "finfo", lambda _dtype: SimpleNamespace(eps=-1.0))
    ran = invoke("export", native, "--to", "merged", "--output", tmp_path / "m")
    assert ran.exit_code == 1
    assert "verification failed: what was written" in ran.stderr
    assert not (tmp_path / "m").exists()


def finished_with_ranks(folder, ranks):
    """A plain LoRA whose modules have these ranks, as a finished run leaves it."""
    model = adapted(tiny_llama, gated=True, task_type="CAUSAL_LM")
    allocator = train(model, steps=4, total_steps=40)
    for gated, rank in zip(allocator.modules, ranks, strict=True):
        gated.live.copy_(torch.arange(4) < rank)
        gated.gate.data *= gated.live
    with pytest.warns(UserWarning, match="training ended after 4 of 40 steps"):
        allocator.finalize_()
    model.save_pretrained(folder)
    start = {"event": "start", "step": 0, "time": 0.0}
    HistoryFile(folder).append(start | {"ranks": {m.name: 4 for m in allocator.modules}})
    return folder


def test_modules_without_ranks_are_told_of_by_export_and_inspect(tmp_path):
    adapter = finished_with_ranks(tmp_path / "a", [3, 0, 1, *[2] * 11])
    ran = invoke("export", adapter, "--to", "ragged", "--output", tmp_path / "r")
    assert ran.exit_code == 0, ran.stderr
    assert "1 modules of rank 0 are left out" in ran.stdout
    ran = invoke("inspect", adapter)
    assert "1 to 3, mean 1.86, 26 components; 1 of 14 modules at 0" in flat(ran.stdout)
    ran = invoke("inspect", finished_with_ranks(tmp_path / "b", [3, 1, *[2] * 12]))
    assert "1 to 3, mean 2, 28 components scaling" not in flat(ran.stdout)
    assert "1 to 3, mean 2, 28 components parameters" in flat(ran.stdout)


def flat(text):
    return " ".join(text.split())


class Clock:
    """In place of time, for a person who watches: writes more of the run at each wait."""

    def __init__(self, *happenings):
        self.happenings, self.waited = list(happenings), []

    def sleep(self, seconds):
        self.waited.append(seconds)
        self.happenings.pop(0)()


def test_watch_follows_a_run_to_its_end(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=20)
    whole = (run / "history.jsonl").read_text().splitlines(keepends=True)
    show = (run / "history.jsonl").write_text
    show("".join(whole[:4]))
    clock = Clock(lambda: show("".join(whole[:-1])), lambda: show("".join(whole)))
    monkeypatch.setattr(look, "time", clock)
    ran = invoke("watch", run, "--every", "7")
    assert ran.exit_code == 0
    assert clock.waited == [7.0, 7.0]
    assert "20 of 20 (finished)" in ran.stdout


def test_ctrl_c_ends_watching_and_is_no_failure(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=20)
    history = (run / "history.jsonl").read_text().splitlines(keepends=True)
    (run / "history.jsonl").write_text("".join(history[:4]))

    def press():
        raise KeyboardInterrupt

    monkeypatch.setattr(look, "time", Clock(press))
    ran = invoke("watch", run)
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert "of 20 (" in ran.stdout
    assert "(finished)" not in ran.stdout
