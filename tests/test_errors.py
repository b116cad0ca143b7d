"""Wrong uses and hostile files: a typed error with a known message, and nothing is harmed by it.

The messages are in errors.json; a warning counts as an error here. With ``DYNLORA_NEW_ERRORS=1`` the
tests write that file instead of comparing with it; read the difference before you commit it.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from dynlora import AdapterFileError, DynLoraConfig
from hostile_folders import CONFIG, HOSTILE, WEIGHTS
from small_net import attached, small_net, train
from wrong_uses import WRONG_USES

SNAPSHOT = Path(__file__).with_name("errors.json")
EXPECTED = json.loads(SNAPSHOT.read_text())
FOUND: dict[str, str] = {}
TYPED = (ValueError, TypeError, KeyError, RuntimeError, OSError, ArithmeticError, UserWarning)


def check(name, error, folder):
    message = f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER")
    message = re.sub(r"0x[0-9a-f]+", "0x…", message)
    message = message.replace("NoMatchingPeftModuleError", "ValueError")  # its name in peft 0.20
    message = re.sub(r"tensor `[^`]*`", "tensor `…`", message)  # safetensors names any of them
    if os.environ.get("DYNLORA_NEW_ERRORS"):
        FOUND[name] = message
        text = json.dumps(FOUND, indent=1, sort_keys=True, ensure_ascii=False)
        SNAPSHOT.write_text(text + "\n")
    else:
        assert message == EXPECTED[name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a gated adapter from the middle of its training."""
    folder = tmp_path_factory.mktemp("whole")
    model, optimizer, _ = attached(total_steps=40, gated=True)
    train(model, optimizer, 5)
    model.save_pretrained(folder)
    return folder


def traits(model):
    """All that a failed load could change."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_same(one, two):
    assert one[1:] == two[1:]
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=0)


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_and_harms_nothing(tmp_path, whole, name):
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    HOSTILE[name](folder)
    base, before = small_net(), files(tmp_path)
    known = traits(base)
    with pytest.raises(TYPED) as caught:
        PeftModel.from_pretrained(base, folder)
    check(name, caught.value, tmp_path)
    assert_same(traits(base), known)
    assert files(tmp_path) == before  # no output, and no trace of code that ran


@pytest.mark.filterwarnings("error::UserWarning")  # whatever -W says
@pytest.mark.parametrize("name", WRONG_USES)
def test_a_wrong_use_is_refused_and_leaves_no_output(tmp_path, name):
    with pytest.raises(TYPED) as caught:
        WRONG_USES[name](tmp_path)
    check(name, caught.value, tmp_path)
    left = {p.name for p in tmp_path.rglob("*")} - {"file"}
    assert left == set()


def test_every_kept_message_belongs_to_a_case():
    assert EXPECTED.keys() == {*HOSTILE, *WRONG_USES}


@pytest.mark.parametrize("name", [n for n in HOSTILE if n.startswith("config is") or "nested" in n])
def test_what_is_not_a_config_is_refused_by_our_own_reader(tmp_path, whole, name):
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    HOSTILE[name](folder)
    with pytest.raises(AdapterFileError, match="adapter_config.json (is not JSON|holds a list)"):
        DynLoraConfig.from_pretrained(str(folder))


def test_the_whole_folder_loads(whole):
    model = PeftModel.from_pretrained(small_net(), whole)
    assert isinstance(model.peft_config["default"], DynLoraConfig)


def test_a_config_alone_can_be_trained_from(tmp_path):
    DynLoraConfig(target_r=2, target_modules=["0"]).save_pretrained(str(tmp_path))
    assert DynLoraConfig.from_pretrained(str(tmp_path)).target_r == 2


# -- fuzzing -------------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=60, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def load_or_refuse(folder):
    """Loading works, or it raises a typed error and the base model is as before."""
    base = small_net()
    known = traits(base)
    try:
        PeftModel.from_pretrained(base, folder)
    except (ValueError, TypeError, KeyError) as error:
        assert_same(traits(base), known)
        return error
    return None


@FUZZ
@given(edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8))
def test_bytes_changed_in_the_weights_never_do_worse_than_an_error(tmp_path, whole, edits):
    folder = tmp_path / "fuzzed"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = bytearray((whole / WEIGHTS).read_bytes())
    for place, value in edits:
        content[int(place * len(content))] = value
    (folder / WEIGHTS).write_bytes(content)
    load_or_refuse(folder)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@FUZZ
@pytest.mark.filterwarnings("ignore")  # PEFT warns of what it ignores
@given(data=st.data())
def test_values_changed_in_the_config_never_do_worse_than_an_error(tmp_path, whole, data):
    folder = tmp_path / "fuzzed"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    config = json.loads((whole / CONFIG).read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[name] = data.draw(JSON_VALUES)
    (folder / CONFIG).write_text(json.dumps(config))
    load_or_refuse(folder)
