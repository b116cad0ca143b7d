"""The command line: help, version, start-up without torch, and verbs of another distribution."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer
from typer.testing import CliRunner

from dynlora.cli import verbs
from dynlora.cli.main import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


BREW = f"{__name__}:brew_app"


@pytest.fixture
def installed(monkeypatch):
    """Verbs that are installed beside the library: a dictionary, empty at first."""
    found = {}
    monkeypatch.setattr(verbs, "installed_verbs", lambda: found)
    return found


brew_app = typer.Typer(add_completion=False)  # what an entry point names


@brew_app.command()
def brew(cups: int):
    """Make coffee."""
    typer.echo(f"{cups} cups")


def test_help_fits_80_columns():
    ran = invoke("--help")
    assert ran.exit_code == 0
    assert max(map(len, ran.stdout.splitlines())) <= 80


def test_version_is_printed():
    assert invoke("--version").stdout.startswith("dynlora ")


def test_python_m_dynlora_is_the_command():
    command = [sys.executable, "-m", "dynlora", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dynlora ")


@pytest.mark.parametrize("arguments", [["--help"], ["trian"], ["train", "--help"], ["--version"]])
def test_help_and_a_typo_do_not_wait_for_torch(arguments):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['peft'] = None\n"
        "from dynlora.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout or done.returncode == 2


@pytest.mark.parametrize("verb", sorted(verbs.LAB_VERBS))
@pytest.mark.parametrize("more", [[], ["--help"], ["some.yaml", "--seed", "3"]], ids=str)
def test_a_verb_of_the_lab_says_how_to_install_it(installed, verb, more):
    ran = invoke(verb, *more)
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert ran.stderr == (f"dynlora: {verb} is a command of dynlora-lab; pip install dynlora-lab\n")


def test_help_lists_verbs_of_the_lab_only_when_it_is_installed(installed):
    assert "bench" not in invoke("--help").stdout
    installed["bench"] = EntryPoint("bench", BREW, verbs.GROUP)
    assert "bench" in invoke("--help").stdout


def test_a_verb_of_another_distribution_is_loaded_when_it_is_asked_for(installed):
    installed["broken"] = EntryPoint("broken", "no_such_module:app", verbs.GROUP)
    installed["coffee"] = EntryPoint("coffee", BREW, verbs.GROUP)
    assert invoke("coffee", "3").stdout == "3 cups\n"
    assert " coffee [OPTIONS]" in invoke("coffee", "--help").stdout


def test_another_distribution_cannot_take_a_verb_of_the_library(installed):
    installed["inspect"] = EntryPoint("inspect", BREW, verbs.GROUP)
    assert "Make coffee" not in invoke("inspect", "--help").stdout


def test_a_mistyped_verb_of_another_distribution_is_suggested(installed):
    installed["coffee"] = EntryPoint("coffee", BREW, verbs.GROUP)
    ran = invoke("cofee")
    assert ran.exit_code == 2
    assert "coffee" in ran.stderr
