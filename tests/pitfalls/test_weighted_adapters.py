"""PEFT's add_weighted_adapter with adapters of ragged ranks."""

import pytest
import torch
from peft import PeftModel

from dynlora.export import export_adapter
from lora_runs import base, finished, logits
from older_peft import SVD

WEIGHTS = [0.7, 0.4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two ragged adapters and their uniform exports."""
    root = tmp_path_factory.mktemp("adapters")
    for seed in (0, 1):
        finished(seed).save_pretrained(root / f"ragged-{seed}")
        export_adapter(root / f"ragged-{seed}", root / f"uniform-{seed}", to="uniform", pad_to=8)
    return root


def both(root, form):
    model = PeftModel.from_pretrained(base(), root / f"{form}-0", adapter_name="first").eval()
    model.load_adapter(root / f"{form}-1", adapter_name="second")
    return model


def updates(model, adapter):
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A
    }


@pytest.mark.parametrize("how", ["cat", SVD])
def test_a_combination_of_ragged_adapters_is_right_in_memory(folders, how):
    model = both(folders, "ragged")
    rank = {"svd_rank": 8} if how == "svd" else {}
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "mixed", combination_type=how, **rank)
    first, second, mixed = (updates(model, name) for name in ("first", "second", "mixed"))
    for name, found in mixed.items():
        expected = WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_combination_of_uniform_exports_survives_saving_and_loading(folders, tmp_path):
    model = both(folders, "uniform")
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "mixed", combination_type="cat")
    model.set_adapter("mixed")
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = PeftModel.from_pretrained(base(), tmp_path / "mixed")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_a_combination_of_ragged_adapters_can_be_loaded_again(folders, tmp_path, how):
    model = both(folders, "ragged")
    rank = {"svd_rank": 8} if how == "svd" else {}
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "mixed", combination_type=how, **rank)
    model.set_adapter("mixed")
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = PeftModel.from_pretrained(base(), tmp_path / "mixed")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_a_linear_combination_of_unlike_ranks_is_refused_by_peft(folders):
    model = both(folders, "ragged")
    model.load_adapter(folders / "uniform-0", adapter_name="padded")
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["first", "padded"], WEIGHTS, "mixed", combination_type="linear")


def test_a_linear_combination_of_uniform_exports_is_taken(folders):
    model = both(folders, "uniform")
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "mixed", combination_type="linear")
    model.set_adapter("mixed")
    assert torch.isfinite(logits(model)).all()
