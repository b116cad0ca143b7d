"""The public names are a promise, importing them is light, and each one is documented."""

import inspect
import json
import subprocess
import sys
from types import ModuleType

import dynlora


def test_public_names_are_the_promised_ones():
    seen = {n for n, v in vars(dynlora).items() if n[0] != "_" and not isinstance(v, ModuleType)}
    assert sorted(seen) == sorted(dynlora.__all__)
    assert {
        "AdapterFileError", "DynLoraCallback", "DynLoraConfig", "RankAllocator", "dem_loss",
        "export_lora", "finalize_",
    } <= seen  # fmt: skip


def loaded_by(statement):
    probe = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_loads_no_data_plotting_or_command_line_code():
    loaded = loaded_by("import dynlora")
    assert not loaded & {"datasets", "matplotlib", "trl", "typer", "transformers.trainer"}
    ours = {name for name in loaded if name.startswith("dynlora.")}
    assert not {name for name in ours if name.split(".")[1] in {"cli", "tasks", "report", "data"}}
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
