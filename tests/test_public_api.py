"""The public names are a promise, importing them is light, and each one is documented."""

import inspect
import json
import subprocess
import sys

import pytest

import dynlora
from dynlora import _public


def test_public_names_are_the_promised_ones():
    seen = {name for name in dir(dynlora) if name[0] != "_"}
    assert sorted(seen) == sorted(dynlora.__all__) == sorted(_public.__all__)
    assert {
        "AdapterFileError", "DynLoraCallback", "DynLoraConfig", "RankAllocator", "dem_loss",
        "export_lora", "finalize_",
    } <= seen  # fmt: skip


def loaded_by(statement):
    probe = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_alone_loads_no_torch():
    loaded = loaded_by("import dynlora")
    assert not loaded & {"torch", "peft", "transformers", "dynlora._public"}


def test_the_first_use_of_a_name_registers_the_method_with_peft():
    for use in ("from dynlora import RankAllocator", "import dynlora; dynlora.dem_loss"):
        probe = f"{use}; from peft.utils.peft_types import PeftType; PeftType('DYNLORA')"
        subprocess.run([sys.executable, "-c", probe], check=True)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dynlora' has no attribute 'DoraConfig'"):
        _ = dynlora.DoraConfig


def test_using_a_name_loads_no_data_plotting_or_command_line_code():
    loaded = loaded_by("from dynlora import DynLoraConfig")
    assert not loaded & {"datasets", "matplotlib", "trl", "typer", "transformers.trainer"}
    ours = {name for name in loaded if name.startswith("dynlora.")}
    assert not {name for name in ours if name.split(".")[1] in {"cli", "report"}}
    assert "dynlora_lab" not in loaded
    host = loaded_by("import peft.tuners.lora, transformers.trainer_callback")
    beyond = {name.split(".")[0] for name in loaded - host} - {"dynlora"}
    assert beyond == set()  # nothing that PEFT and transformers do not load themselves


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


def test_importing_twice_registers_once():
    probe = (
        "import importlib, dynlora.adapter.tuner as t; from peft.mapping import *; "
        "t.register(); t.register(); "
        "from peft.utils.peft_types import PeftType; assert PeftType('DYNLORA') is PeftType.DYNLORA; "
        "assert [m.value for m in PeftType].count('DYNLORA') == 1"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
