"""An existing LoRA becomes a DynLora adapter with the same function, and shrinks in training."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dynlora import DynLoraConfig, DynLoraModel, RankAllocator, export_lora, warm_start_
from small_net import adamw, data, small_net, train


def trained_lora(path, **fields):
    """A folder with a LoRA of rank 6 on the small net."""
    model = get_peft_model(
        small_net(), LoraConfig(r=6, lora_alpha=9, target_modules=["0", "1", "2"], **fields)
    )
    train(model, adamw(model), 30)
    model.save_pretrained(path)
    return model


def loaded(path, **options):
    return PeftModel.from_pretrained(small_net(), path, is_trainable=True, **options)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"1": 3}}], ids=str)
def test_the_function_does_not_change(tmp_path, fields):
    trained_lora(tmp_path, **fields)
    model = loaded(tmp_path)
    expected = model(data()[0])
    config = warm_start_(model, target_r=2)
    torch.testing.assert_close(model(data()[0]), expected, rtol=0, atol=1e-6)
    assert isinstance(model.base_model, DynLoraModel)
    assert model.peft_config["default"] is config
    assert isinstance(config, DynLoraConfig)
    assert config.init_r == 6


def test_a_large_lora_shrinks_to_its_budget_and_stays_close(tmp_path):
    model = trained_lora(tmp_path)
    x, y = data()
    before = ((model(x) - y) ** 2).mean().item()
    model = loaded(tmp_path)
    warm_start_(model, target_r=2, dem_weight=0.0, prune_interval=2)
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, total_steps=40)
    train(model, optimizer, 40)
    assert sum(allocator.finalize_().values()) == 6
    assert ((model(x) - y) ** 2).mean().item() < before
    export_lora(model, tmp_path / "small")
    again = PeftModel.from_pretrained(small_net(), tmp_path / "small")
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-5)


def test_the_components_are_the_singular_values_of_the_update(tmp_path):
    trained_lora(tmp_path)
    model = loaded(tmp_path)
    delta = model.get_base_model().layers[1].get_delta_weight("default").detach()
    warm_start_(model, target_r=2)
    gated = RankAllocator(model, adamw(model), total_steps=5).layers[1]
    a, b, _ = gated.parameters
    norms = a.norm(dim=1) * b.norm(dim=0) * gated.scaling
    expected = torch.linalg.svdvals(delta)
    torch.testing.assert_close(norms[:5], expected, rtol=1e-4, atol=1e-6)


def test_training_a_warm_start_without_an_allocator_fails_at_the_first_step(tmp_path):
    trained_lora(tmp_path)
    model = loaded(tmp_path)
    warm_start_(model, target_r=2)
    with pytest.raises(RuntimeError, match="without a RankAllocator"):
        train(model, adamw(model), 1)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda m: m, {"target_r": 7}, "target_r=7 must not exceed init_r=6"),
        (
            lambda m: m,
            {"target_r": 2, "adapter": "x"},
            r"adapter='x' must name a plain LoRA.*default",
        ),
        (lambda m: m.requires_grad_(False), {"target_r": 2}, "is not trainable: load it with"),
    ],
)
def test_what_cannot_start_warm_is_refused_and_unchanged(tmp_path, change, fields, message):
    trained_lora(tmp_path)
    model = change(loaded(tmp_path))
    with pytest.raises(ValueError, match=message):
        warm_start_(model, **fields)
    assert type(model.peft_config["default"]) is LoraConfig
    assert not [n for n, _ in model.named_parameters() if n.endswith(".c")]


def test_nvidias_dora_cannot_start_warm(tmp_path):
    trained_lora(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True cannot be combined with dynlora"):
        warm_start_(loaded(tmp_path), target_r=2)
