"""Run the tests of the installed PEFT against dynlora: ``python scripts/peft_suite.py [pytest args]``.

Fetches PEFT's source distribution with pip, once per version, unpacks its tests into a cache folder
(``$DYNLORA_CACHE``, else ``~/.cache/dynlora``) and runs its test_custom_models.py there with
peft_suite_conftest.py beside it. Nothing else is fetched: the hub is switched off.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CONFTEST = Path(__file__).with_name("peft_suite_conftest.py")

PYTEST_INI = """\
[pytest]
addopts = -p no:randomly -p no:cacheprovider --disable-socket --allow-unix-socket -W ignore -q
timeout = 60
"""


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


def main() -> int:
    """Fetch the suite if it is not there yet, run it, and return pytest's exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All other arguments go to pytest, such as -k merge or -x.",
    )
    parser.add_argument("--refetch", action="store_true", help="fetch PEFT's tests again")
    options, pytest_arguments = parser.parse_known_args()
    peft_version = version("peft")
    folder = suite_folder(peft_version)
    if options.refetch:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "tests").is_dir():
        fetch_tests(peft_version, folder)
    shutil.copy(CONFTEST, folder / "tests" / "conftest.py")
    (folder / "pytest.ini").write_text(PYTEST_INI)
    command = [sys.executable, "-m", "pytest", "tests/test_custom_models.py", *pytest_arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
