"""Exports at their edges: damaged sources, tensors that are not understood, wrong options."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from dynlora.export import export_adapter
from dynlora.export.models import outputs
from tiny_models import adapted, logits, tiny_llama, tiny_t5, train

WEIGHTS = "adapter_model.safetensors"
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")


@pytest.fixture
def plain(tmp_path):
    """The folder of a plain LoRA of rank 2, not all zero."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def changed(folder, change):
    """The folder with other tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, folder / WEIGHTS)
    return folder


def configured(folder, **fields):
    """The folder with other fields in its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def refused(source, error, message, **options):
    """The export fails with this message and leaves nothing."""
    target = source.parent / "out"
    with pytest.raises(error, match=message):
        export_adapter(source, target, **options)
    assert not target.exists()


def test_a_pickle_is_not_read(plain):
    (plain / WEIGHTS).rename(plain / "adapter_model.bin")
    refused(plain, FileNotFoundError, "adapter_model.bin is a pickle, which may run code; load and")


def test_a_file_that_was_cut_off_is_named(plain):
    whole = (plain / WEIGHTS).read_bytes()
    (plain / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(plain, ValueError, f"{WEIGHTS} is not a whole safetensors file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), r"'model.layers.0.self_attn.q_proj' has no lora_B; the file is incom"),
        (lambda t: t.update({A: t[A][:1]}), r"has A of shape \(1, 16\) and B of shape \(16, 2\)"),
        (lambda t: t.update({A: t[A] / 0}), "lora|A of module .* holds NaN or infinity"),
        (lambda t: t.update({A: t[A][:1], B: t[B][:, :1]}), "has rank 1, but adapter_config.json says 2"),
        (lambda t: t.update({B.replace("B.weight", "magnitude_vector"): t[A]}), "neither a factor of a"),
        (lambda t: t.update({"base_model.model.head.lookup": t[A]}), "'.*head.lookup', which is neither"),
        (lambda t: [t[k].zero_() for k in t], "every component is 0, so the adapter equals its base"),
        (lambda t: [t.pop(k) for k in list(t)], "holds no lora_A and lora_B"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_and_never_dropped(plain, change, message):
    changed(plain, change)
    for form in ("ragged", "uniform"):
        refused(plain, ValueError, message, to=form)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "an adapter of method LOHA; only LoRA and DynLora"),
        ({"use_dora": True}, "trained with use_dora, which changes what its factors mean"),
        ({"init_lora_weights": "pissa"}, "PEFT changes the base's weights at each load"),
    ],
    ids=str,
)
def test_other_methods_are_refused(plain, fields, message):
    refused(configured(plain, **fields), ValueError, message)


def test_a_gated_adapter_without_a_living_component_is_its_base_model(tmp_path):
    model = adapted(tiny_llama)
    for name, parameter in model.named_parameters():
        if name.endswith((".c", ".lora_c")):
            parameter.data.zero_()
    model.save_pretrained(tmp_path / "in")
    refused(tmp_path / "in", ValueError, "every component is 0, so the adapter equals its base")


def test_wrong_options_say_what_is_right(plain, tmp_path):
    refused(tmp_path, FileNotFoundError, "holds no adapter_config.json")
    refused(plain, ValueError, "pad_to=8 belongs to the form uniform, not to ragged", pad_to=8)
    with pytest.raises(ValueError, match="is the source; name another folder"):
        export_adapter(plain, plain)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
        export_adapter(plain, tmp_path / "file")
    (tmp_path / "checkpoint-7").mkdir()
    refused(tmp_path, FileNotFoundError, "did you mean .*checkpoint-7")


# -- comparing ---------------------------------------------------------------------------------


def test_a_model_of_an_encoder_and_a_decoder_is_compared_too(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "base")
    model = adapted(tiny_t5, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    train(model)
    model.save_pretrained(tmp_path / "in")
    base = str(tmp_path / "base")
    done = export_adapter(tmp_path / "in", tmp_path / "out", base=base, verify=True)
    assert done.max_difference <= 1e-5 * done.max_output
    assert done.max_output > 0
    assert logits(model).isfinite().all()


def test_a_model_of_something_else_says_what_cannot_be_made_up():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = ViTModel(ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4))
    assert outputs(model).shape == (2, 5, 16)
    model.main_input_name = "point_cloud"
    with pytest.raises(ValueError, match="takes 'point_cloud', which cannot be made up here"):
        outputs(model)
