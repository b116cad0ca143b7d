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


def loaded_by(statement):
    probe = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_alone_loads_no_torch():
    loaded = loaded_by("import dynlora")
    assert not loaded & {"torch", "peft", "transformers"}


def test_the_gated_config_registers_the_method_with_peft_and_nothing_else_does():
    known = "from peft.utils.peft_types import PeftType; print('DYNLORA' in PeftType.__members__)"
    for use, expected in (("DynLoraConfig", "True"), ("RankAllocator, DynLoraCallback", "False")):
        probe = f"from dynlora import {use}; {known}"
        done = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[-1] == expected


def test_every_name_is_found_where_the_package_says():
    for name in dynlora.__all__:
        assert getattr(dynlora, name).__module__.startswith("dynlora.")


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
        "import dynlora.gated.model as t; from peft.mapping import *; "
        "t.register(); t.register(); "
        "from peft.utils.peft_types import PeftType; assert PeftType('DYNLORA') is PeftType.DYNLORA; "
        "assert [m.value for m in PeftType].count('DYNLORA') == 1"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
