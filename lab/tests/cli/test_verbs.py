"""The lab's verbs as its metadata names them: they exist, and their help does not wait for torch."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dynlora
import dynlora_lab
from dynlora.cli.verbs import GROUP, LAB_VERBS

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf8"))
VERBS = PROJECT["project"]["entry-points"][GROUP]


def test_the_library_knows_the_verbs_that_the_lab_brings():
    assert set(VERBS) == LAB_VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_an_entry_point_leads_to_a_command(verb):
    assert isinstance(EntryPoint(verb, VERBS[verb], GROUP).load(), typer.Typer)


def test_the_verbs_are_read_without_torch():
    modules = {value.partition(":")[0] for value in VERBS.values()}
    code = f"import sys; sys.modules['torch'] = sys.modules['peft'] = None; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file; check its name."),
        ("task: [x\n", "cannot be read as YAML: "),
        ("- x\n", "holds no fields; begin with '"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "bench"])
def test_a_file_without_fields_is_refused_before_torch_is_imported(
    tmp_path, monkeypatch, verb, content, message
):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content, encoding="utf8")
    for module in ("dynlora_lab.cli.train", "dynlora_lab.cli.bench"):  # what runs it
        monkeypatch.setitem(sys.modules, module, None)
    ran = CliRunner().invoke(EntryPoint(verb, VERBS[verb], GROUP).load(), [str(path)])
    assert ran.exit_code == 2
    assert message in ran.stderr


def test_what_reads_the_fields_of_a_file_is_quick_to_import():
    code = "import sys; sys.modules['torch'] = sys.modules['peft'] = sys.modules['transformers'] = None"
    code += "; import dynlora_lab.tasks.typed_fields, dynlora.cli.terminal"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_distributions_have_one_version():
    assert dynlora_lab.__version__ == dynlora.__version__
