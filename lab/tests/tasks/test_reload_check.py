"""Logits that differ after a re-load: is it the weights, and does it happen again?"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, set_seed

from dynlora_lab.tasks import reload_check
from dynlora_lab.tasks.reload_check import ReloadError, SecondLook, compare_reloaded
from dynlora_lab.tasks.reload_child import tensor_digests
from tiny_classifier import save_encoder

BATCH = {
    "input_ids": torch.tensor([[2, 4, 3, 0], [2, 6, 7, 3], [2, 5, 8, 3]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
}
CHANGED = "base_model.model.bert.encoder.layer.1.output.dense.weight"


@pytest.fixture
def base(tmp_path):
    return save_encoder(tmp_path / "tiny")


@pytest.fixture
def model(base):
    set_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = LoraConfig(
        r=2, target_modules=["output.dense"], task_type="SEQ_CLS", init_lora_weights=False
    )
    return get_peft_model(classifier, config).eval()


def compared(folder, base, model):
    return compare_reloaded(folder, BATCH, base=base, pad_token_id=0, model=model)


def test_one_wrong_weight_is_named(tmp_path, base, model, monkeypatch):
    def reloaded_here(adapter, batch, **_):
        classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        again = PeftModel.from_pretrained(classifier, adapter).eval()
        with torch.no_grad():
            return again(**batch).logits, tensor_digests(again)

    monkeypatch.setattr(reload_check, "_reloaded", reloaded_here)
    model.save_pretrained(tmp_path / "out")
    assert compared(tmp_path / "out", base, model).second_look is None

    layer = model.base_model.model.bert.encoder.layer[1].output.dense
    layer.base_layer.weight.data[3, 5] += 0.1
    reload = compared(tmp_path / "out", base, model)
    assert reload.difference > 1e-5
    look = reload.second_look
    assert look.tensors == look.tensors_again == (CHANGED,)
    assert look.trained_again == 0
    assert look.reloaded_again == reload.difference
    assert set(look.rows) <= {0, 1, 2}
    assert CHANGED in str(look)
    assert "please report this" in str(look)


def test_logits_that_are_wrong_once_are_told_from_weights(tmp_path, base, model, monkeypatch):
    with torch.no_grad():
        right = model(**BATCH).logits
    answer = (right, tensor_digests(model))
    monkeypatch.setattr(reload_check, "_reloaded", lambda *_, **__: answer)
    wrong = right.clone()
    wrong[2, 1] += 1e-3
    answers = iter([wrong, right])
    monkeypatch.setattr(reload_check, "_logits_on_cpu", lambda *_: next(answers))

    reload = compared(tmp_path, base, model)
    assert reload.difference == pytest.approx(1e-3, rel=1e-3)
    assert reload.second_look == SecondLook(
        rows=(2,),
        tensors=(),
        tensors_again=(),
        trained_again=reload.difference,
        reloaded_again=0,
    )


@pytest.mark.parametrize(
    ("tensors", "tensors_again", "reloaded_again", "end"),
    [
        ((), (), 0.0, "one process computed a wrong value, the saved adapter is right: run again"),
        (("w",), (), 0.0, "read or kept a wrong value, the saved adapter is right: run again"),
        (("w",), ("w",), 1e-4, "do not give what was trained: please report this"),
        ((), (), 1e-4, "equal weights compute different logits here: please report this"),
        ((), (), float("nan"), "equal weights compute different logits here: please report this"),
    ],
)
def test_the_second_look_ends_with_what_to_do(tensors, tensors_again, reloaded_again, end):
    look = SecondLook(
        rows=(0, 1, 2, 5, 9),
        tensors=tensors,
        tensors_again=tensors_again,
        trained_again=0.0,
        reloaded_again=reloaded_again,
    )
    assert str(look).endswith(end)
    assert str(look).startswith(
        f"rows 0, 1, 2 and 2 more; tensors that differ: {'w' if tensors else 'none'};"
    )


def test_digests_compare_layers_with_and_without_an_adapter_to_the_bit(model):
    digests = tensor_digests(model)
    assert CHANGED in digests
    assert not [name for name in digests if "original_module" in name or "base_layer" in name]
    assert any(name.endswith("position_ids") for name in digests)  # buffers that no file holds
    weight = model.base_model.model.bert.encoder.layer[1].output.dense.base_layer.weight
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))
    after = tensor_digests(model)
    assert [name for name in digests if digests[name] != after[name]] == [CHANGED]


def test_reload_says_why_it_failed(tmp_path, model):
    with pytest.raises(ReloadError, match="does not load with stock PEFT: .*Error"):
        compared(tmp_path, str(tmp_path), model)
