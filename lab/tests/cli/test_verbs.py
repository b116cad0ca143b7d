"""The lab's verbs as its metadata names them: they exist, and their help does not wait for torch."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

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


def test_both_distributions_have_one_version():
    assert dynlora_lab.__version__ == dynlora.__version__
