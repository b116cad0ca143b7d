"""Run the LoRA tests of the installed PEFT with a RankAllocator on each model that they train.

Fetches PEFT's source distribution with pip, once per version, unpacks its tests into a cache folder
(``$DYNLORA_CACHE``, else ``~/.cache/dynlora``) and runs those files that hold LoRA rows, once as they
are and once for each variant of peft_suite_plugin.py. Nothing else is fetched: the hub is off.

``python scripts/peft_suite.py [--variants read cut every] [pytest args]``
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
FILES = (
    "custom_models", "target_parameters", "lorafa", "loraplus", "riemannian_lora", "trainable_tokens",
    "other", "tuners_utils", "arrow", "mixed", "low_level_api", "lora_variants", "shadow",
)  # fmt: skip
"""PEFT's test files, without ``test_``, that train or change a LoRA without a model of the hub."""

COMPARES_SHAPES = {
    "test_only_params_are_updated",
    "test_training_works",
    "test_LoraFAOptimizer_step",
    "test_step_runs_and_updates_lora_params",
}
"""Tests that compare weights before and after training: cut ones have other shapes, or are gone."""

PYTEST_INI = """\
[pytest]
addopts = -p no:randomly -p no:cacheprovider --disable-socket --allow-unix-socket -W ignore -q
timeout = 60
"""

Outcomes = dict[str, dict[str, Any]]


def suite_folder(peft_version: str) -> Path:
    """Where the tests of one PEFT version are kept."""
    cache = os.environ.get("DYNLORA_CACHE") or Path.home() / ".cache" / "dynlora"
    return Path(cache) / "peft-suite" / peft_version


def fetch_tests(peft_version: str, folder: Path) -> None:
    """Unpack ``tests/`` of PEFT's source distribution as ``folder/tests``.

    Raises:
        SystemExit: pip finds no source distribution of that version, or it holds no tests.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", "peft", "--dest", temporary]
        pip = [sys.executable, "-m", "pip", *fetch, f"peft=={peft_version}"]
        if subprocess.run(pip, check=False).returncode != 0:
            sys.exit(
                f"pip could not fetch the source distribution of peft {peft_version} (its message is "
                "above). The suite needs a released version and a package index that pip can reach."
            )
        archive = next(Path(temporary).glob("peft-*.tar.gz"))
        with tarfile.open(archive) as tar:
            tests = [m for m in tar.getmembers() if "/tests/" in m.name and m.name.endswith(".py")]
            if not any(m.name.endswith("/tests/test_custom_models.py") for m in tests):
                sys.exit(f"{archive.name} holds no tests/test_custom_models.py; try another peft.")
            tar.extractall(temporary, members=tests, filter="data")
        unpacked = next(Path(temporary).glob("peft-*/tests"))
        (unpacked / "__init__.py").touch()
        folder.mkdir(exist_ok=True)
        unpacked.rename(folder / "tests")


def run(variant: str, folder: Path, pytest_arguments: list[str]) -> Outcomes:
    """What came out of each test in one variant, by test id.

    Raises:
        SystemExit: pytest could not run them.
    """
    outcomes = folder / f"outcomes-{variant}.jsonl"
    outcomes.unlink(missing_ok=True)
    paths = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": paths,
        "ALLOCATE": variant,
        "OUTCOMES": str(outcomes),
    }
    files = [f"tests/test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite_plugin", *files, *pytest_arguments]
    log = folder / f"log-{variant}.txt"
    with log.open("w") as file:
        status = subprocess.run(
            command, cwd=folder, env=environment, check=False, stdout=file, stderr=file
        )
    if status.returncode > 1 or not outcomes.exists():
        sys.exit(f"pytest could not run PEFT's tests; see {log}.")
    lines = outcomes.read_text(encoding="utf-8").splitlines()
    return {line["test"]: line for line in map(json.loads, lines)}


def compares_shapes(test: str) -> bool:
    """Whether a test cannot hold for an adapter that has become smaller."""
    return test.rpartition("::")[2].partition("[")[0] in COMPARES_SHAPES


def report(variant: str, found: Outcomes, stock: Outcomes) -> int:
    """Print one variant's figures; the number of its failures that stock PEFT has not."""
    counts = Counter(line["outcome"] for line in found.values())
    trained = [line for line in found.values() if line.get("allocators")]
    refused = sum(bool(line.get("refused")) for line in found.values())
    failed = [
        line
        for test, line in found.items()
        if line["outcome"] == "failed" and stock.get(test, {}).get("outcome") != "failed"
    ]
    new = [line for line in failed if not (line.get("frozen") and compares_shapes(line["test"]))]
    sys.stdout.write(
        f"{variant}: {counts['passed']} passed, {counts['skipped']} skipped, {counts['failed']} failed, "
        f"{len(failed)} of them not with stock PEFT, {len(failed) - len(new)} of these because they "
        f"compare shapes; {sum(line['allocators'] for line in trained)} "
        f"allocators in {len(trained)} tests saw {sum(line['steps'] for line in trained)} steps, "
        f"{sum(line['frozen'] for line in trained)} froze; refused by design in {refused} tests\n"
    )
    for line in new:
        sys.stdout.write(f"  {line['test']}: {' '.join(line['reason'])}\n")
    return len(new)


def main() -> int:
    """Fetch the tests if they are not there yet, run the variants, and compare each with stock PEFT."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All other arguments go to pytest, such as -k merge or -x.",
    )
    parser.add_argument("--refetch", action="store_true", help="fetch PEFT's tests again")
    parser.add_argument(
        "--variants", nargs="+", choices=["read", "cut", "every"], default=["read", "cut", "every"]
    )
    options, pytest_arguments = parser.parse_known_args()
    peft_version = version("peft")
    folder = suite_folder(peft_version)
    if options.refetch:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "tests").is_dir():
        fetch_tests(peft_version, folder)
    (folder / "pytest.ini").write_text(PYTEST_INI)
    stock = run("none", folder, pytest_arguments)
    report("none", stock, stock)
    failures = [
        report(variant, run(variant, folder, pytest_arguments), stock)
        for variant in options.variants
    ]
    return int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
