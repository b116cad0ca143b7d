"""The public names are a promise, importing them is light, and each one is documented."""

import inspect
import json
import subprocess
import sys

import pytest

import dynlora


def test_public_names_are_the_promised_ones():
    seen = {name for name in dir(dynlora) if name[0] != "_"}
    assert sorted(seen) == sorted(dynlora.__all__)
    assert {
        "DynLoraCallback", "DynLoraConfig", "RankAllocator", "dem_loss", "export_lora", "finalize_",
        "warm_start_",
    } <= seen  # fmt: skip


IN_A_FRESH_PROCESS = """
import json, os, sys

def tell(name, statement):
    if os.fork() == 0:  # a copy of this process, in which nothing else was asked
        exec(statement)
        kinds = getattr(sys.modules.get("peft.utils.peft_types"), "PeftType", ())
        registered = [kind.value for kind in kinds].count("DYNLORA")
        print(json.dumps([name, [sorted(sys.modules), registered]]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0

tell("package", "import dynlora")
import peft.tuners.lora, transformers.trainer_callback
tell("host", "")
tell("stock", "from dynlora import RankAllocator, DynLoraCallback")
tell("gated", "from dynlora import DynLoraConfig")
tell("gated twice", "from dynlora.gated.model import register; register(); register()")
"""


@pytest.fixture(scope="module")
def imported():
    """By what a fresh process imports: the modules loaded then, and how often PEFT knows the gates."""
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {n: (set(m), k) for n, (m, k) in map(json.loads, done.stdout.splitlines())}


def test_importing_the_package_alone_loads_no_torch(imported):
    loaded, _ = imported["package"]
    assert not loaded & {"torch", "peft", "transformers"}


def test_the_gated_config_registers_the_method_with_peft_once_and_nothing_else_does(imported):
    registered = {name: times for name, (_, times) in imported.items()}
    assert registered == {"package": 0, "host": 0, "stock": 0, "gated": 1, "gated twice": 1}


def test_using_a_name_loads_no_data_plotting_or_command_line_code(imported):
    (host, _), (loaded, _) = imported["host"], imported["gated"]
    assert not loaded & {"datasets", "matplotlib", "trl", "typer", "transformers.trainer"}
    ours = {name for name in loaded if name.startswith("dynlora.")}
    assert not {name for name in ours if name.split(".")[1] in {"cli", "report"}}
    assert "dynlora_lab" not in loaded
    beyond = {name.split(".")[0] for name in loaded - host} - {"dynlora"}
    assert beyond == set()  # nothing that PEFT and transformers do not load themselves


def test_every_name_is_found_where_the_package_says():
    for name in dynlora.__all__:
        assert getattr(dynlora, name).__module__.startswith("dynlora.")


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dynlora' has no attribute 'DoraConfig'"):
        _ = dynlora.DoraConfig


def test_every_public_name_and_method_has_a_docstring():
    for name in dynlora.__all__:
        public = getattr(dynlora, name)
        assert inspect.getdoc(public), name
        if inspect.isclass(public):
            for method, value in vars(public).items():
                if not method.startswith("_") and callable(value):
                    assert inspect.getdoc(value), f"{name}.{method}"


def test_no_public_name_reads_as_nvidias_dora():
    assert not [n for n in dynlora.__all__ if "dora" in n.lower()]
