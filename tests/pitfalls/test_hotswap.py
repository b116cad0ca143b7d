"""PEFT's hotswap_adapter with adapters of ragged ranks."""

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from dynlora.export import export_adapter
from lora_runs import adapted, base, finished, logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A ragged adapter, its uniform export, and an untouched LoRA of the first rank."""
    root = tmp_path_factory.mktemp("adapters")
    model = finished()
    model.save_pretrained(root / "ragged")
    export_adapter(root / "ragged", root / "uniform", to="uniform", pad_to=8)
    adapted(r=8, lora_alpha=8).save_pretrained(root / "whole")
    return root


def test_a_uniform_export_is_swapped_in_without_loss(folders):
    loaded = PeftModel.from_pretrained(base(), folders / "whole").eval()
    hotswap_adapter(loaded, folders / "uniform", "default", torch_device="cpu")
    expected = logits(PeftModel.from_pretrained(base(), folders / "ragged"))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_a_ragged_adapter_is_refused_by_peft_instead_of_scaled_wrongly(folders):
    loaded = PeftModel.from_pretrained(base(), folders / "whole")
    with pytest.raises(ValueError, match="incompatible: for alpha_pattern"):
        hotswap_adapter(loaded, folders / "ragged", "default", torch_device="cpu")


def test_a_checkpoint_from_before_the_freeze_is_swapped_in_as_it_is(folders, tmp_path):
    model = adapted(r=8, lora_alpha=8)
    model.save_pretrained(tmp_path / "early")
    loaded = PeftModel.from_pretrained(base(), folders / "whole").eval()
    hotswap_adapter(loaded, tmp_path / "early", "default", torch_device="cpu")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_ragged_adapters_of_the_same_ranks_are_swapped_as_they_are(folders, tmp_path):
    other = finished(seed=1)
    other.save_pretrained(tmp_path / "other")
    loaded = PeftModel.from_pretrained(base(), folders / "ragged").eval()
    hotswap_adapter(loaded, tmp_path / "other", "default", torch_device="cpu")
    torch.testing.assert_close(logits(loaded), logits(other), rtol=0, atol=1e-5)
