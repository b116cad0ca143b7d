"""The oldest versions that pyproject.toml allows, and the frameworks that pip must install beside them."""

import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement

from doc_fences import ROOT, text_of

BOUNDS = {
    r.name: r.specifier
    for r in map(Requirement, tomllib.loads(text_of("pyproject.toml"))["project"]["dependencies"])
}


def oldest(name):
    (lower,) = (s.version for s in BOUNDS[name] if s.operator == ">=")
    return lower


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_oldest_installs_the_lower_bounds():
    printed = subprocess.run(
        ["make", "-n", "-B", ".venv-oldest/stamp"],  # noqa: S607
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in ("transformers", "peft", "accelerate"):
        assert f" {name}=={oldest(name)} " in printed


def rows():
    """Framework, its line for pip, and the versions that pip takes, by the page's table."""
    table = (
        text_of("docs/frameworks.md").partition("| framework | asks for |")[2].partition("\n\n")[0]
    )
    for line in table.splitlines()[2:]:
        framework, _, install, versions, _ = (cell.strip() for cell in line.strip("|").split("|"))
        yield framework, install, dict(re.findall(r"(\w+) (\d[\d.]*)", versions))


def test_what_pip_takes_beside_each_framework_is_within_our_bounds():
    checked = []
    for framework, install, versions in rows():
        if "--no-deps" not in install:
            assert {"peft", "transformers"} <= versions.keys(), framework
            for name in versions.keys() & BOUNDS.keys():
                assert BOUNDS[name].contains(versions[name]), (framework, name)
            checked.append(framework.split()[0])
    assert checked == ["axolotl", "ms-swift", "Unsloth", "TRL"]
