"""An existing LoRA is rotated into an orthogonal basis, with the same function, and shrinks in training."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dynlora import warm_start_
from dynlora.lora.components import find_components
from small_net import TARGETS, adamw, allocated, data, small_net, train
from tiny_models import EVERY_LAYER, logits, random_lora

FIELDS = {"r": 6, "lora_alpha": 9, "target_modules": TARGETS}


def trained_lora(path, **fields):
    """A folder with a LoRA of rank 6 on the small net."""
    model = get_peft_model(small_net(), LoraConfig(**{**FIELDS, **fields}))
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
    kept = {n: p for n, p in model.named_parameters() if "lora_" in n}
    before = {n: p.detach().clone() for n, p in kept.items()}
    assert warm_start_(model) is None
    torch.testing.assert_close(model(data()[0]), expected, rtol=0, atol=1e-6)
    assert all(p is kept[n] for n, p in model.named_parameters() if n in kept)
    assert not any(torch.equal(p, before[n]) for n, p in kept.items())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize(("build", "fields"), EVERY_LAYER)
def test_so_it_is_on_every_kind_of_layer(build, fields):
    model = random_lora(build, fields)
    expected = logits(model)
    warm_start_(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_components_become_orthogonal_to_each_other_largest_first(tmp_path):
    trained_lora(tmp_path)
    model = loaded(tmp_path)
    warm_start_(model)
    module = find_components(model, "default")[1]
    a, b = (f.parameter.detach() for f in module.factors)
    products = (a @ a.T) * (b.T @ b)  # of the components with each other
    torch.testing.assert_close(products, torch.diag(products.diagonal()), rtol=0, atol=1e-5)
    sizes = b.norm(dim=0)
    assert torch.equal(sizes, sizes.sort(descending=True).values)


def test_a_large_lora_shrinks_to_its_budget_and_stays_close(tmp_path):
    model = trained_lora(tmp_path)
    x, y = data()
    before = ((model(x) - y) ** 2).mean().item()
    model = loaded(tmp_path)
    warm_start_(model)
    optimizer = adamw(model)
    allocator = allocated(model, optimizer, target_r=3, prune_interval=2)
    train(model, optimizer, 40)
    allocator.finalize_()
    assert allocator.cost <= allocator.target_cost == 3 * 34
    assert ((model(x) - y) ** 2).mean().item() < 1.2 * before
    model.save_pretrained(tmp_path / "small")
    again = PeftModel.from_pretrained(small_net(), tmp_path / "small")
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-6)


def test_modules_of_rank_0_and_gated_adapters_stay_as_they_are():
    from small_net import adapted, attached

    model, optimizer, allocator = attached(total_steps=20, target_r=0.5)
    train(model, optimizer, 20)
    assert 0 in allocator.ranks().values()
    before = model(data()[0])
    warm_start_(model)
    torch.testing.assert_close(model(data()[0]), before, rtol=0, atol=1e-6)
    gated = adapted(gated=True)
    state = {k: v.clone() for k, v in gated.state_dict().items()}
    warm_start_(gated)
    assert all(torch.equal(v, gated.state_dict()[k]) for k, v in state.items())


def test_a_name_of_no_adapter_is_refused():
    model = get_peft_model(small_net(), LoraConfig(**FIELDS))
    with pytest.raises(ValueError, match=r"adapter='x' must name one of .*default"):
        warm_start_(model, adapter="x")
