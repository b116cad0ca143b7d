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
import json, sys
seen = []
def note():
    known = getattr(sys.modules.get("peft.utils.peft_types"), "PeftType", None)
    seen.append([sorted(sys.modules), known is not None and "DYNLORA" in known.__members__])
import dynlora
note()
import peft.tuners.lora, transformers.trainer_callback
note()
from dynlora import RankAllocator, DynLoraCallback
note()
from dynlora import DynLoraConfig
note()
import dynlora.gated.model
from peft.utils.peft_types import PeftType
for _ in range(2):
    dynlora.gated.model.register()
assert PeftType("DYNLORA") is PeftType.DYNLORA
seen.append([member.value for member in PeftType].count("DYNLORA"))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def imported():
    """What one import after the other loaded into a fresh process: the modules so far, and whether PEFT
    knows the gated method; last, how often it does after two more registrations."""
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *after, registered = json.loads(done.stdout.splitlines()[-1])
    names = "package", "host", "allocator", "gated config"
    return {n: (set(m), k) for n, (m, k) in zip(names, after, strict=True)}, registered


def test_importing_the_package_alone_loads_no_torch(imported):
    loaded, _ = imported[0]["package"]
    assert not loaded & {"torch", "peft", "transformers"}


def test_the_gated_config_registers_the_method_with_peft_once_and_nothing_else_does(imported):
    after, registered = imported
    assert [is_known for _, is_known in after.values()] == [False, False, False, True]
    assert registered == 1


def test_using_a_name_loads_no_data_plotting_or_command_line_code(imported):
    (host, _), (loaded, _) = imported[0]["host"], imported[0]["gated config"]
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
