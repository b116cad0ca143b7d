"""Exported adapters under load: several on one base, mixed in a batch, and swapped a thousand times."""

import gc

import psutil
import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from dynlora.export import export_adapter, export_lora
from tiny_models import VOCABULARY, adapted, tiny_llama, train

CLOSE = {"rtol": 0, "atol": 1e-5}
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters whose ranks differ, ragged and uniform."""
    root = tmp_path_factory.mktemp("serving")
    tiny_llama().save_pretrained(root / "base")
    for number, name in enumerate(NAMES):
        model = adapted(tiny_llama, gated=True, init_r=4 + number, target_r=1 + number)
        train(model, steps=12, lr=1e-2 * (number + 1))
        export_lora(model, root / "in" / name)
        for form in ("ragged", "uniform"):
            export_adapter(root / "in" / name, root / form / name, to=form, base=str(root / "base"))
    return root


def inputs():
    draws = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (4, 9), generator=draws)


@torch.no_grad()
def alone(folder):
    model = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
    return model(input_ids=inputs()).logits


@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_a_mixed_batch_gives_each_row_what_its_adapter_gives_alone(folders, form):
    model = PeftModel.from_pretrained(tiny_llama(), str(folders / form / "a"), adapter_name="a")
    for name in NAMES[1:]:
        model.load_adapter(str(folders / form / name), adapter_name=name)
    rows = [*NAMES, "__base__"]
    with torch.no_grad():
        mixed = model.eval()(input_ids=inputs(), adapter_names=rows).logits
        base = tiny_llama()(input_ids=inputs()).logits
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[i], alone(folders / form / name)[i], **CLOSE)
    torch.testing.assert_close(mixed[3], base[3], **CLOSE)


@pytest.mark.slow
def test_a_thousand_swaps_keep_every_output_and_the_memory(folders):
    """Ragged ranks swap in place once all have room for the largest rank."""
    model = PeftModel.from_pretrained(tiny_llama(), str(folders / "uniform" / "a"))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.eval()
    expected = {name: alone(folders / "uniform" / name) for name in NAMES}
    process, memory = psutil.Process(), 0
    for swap in range(1000):
        name = NAMES[swap % 3]
        hotswap_adapter(model, str(folders / "uniform" / name), adapter_name="default")
        if swap % 100 < 3:
            with torch.no_grad():
                torch.testing.assert_close(
                    model(input_ids=inputs()).logits, expected[name], **CLOSE
                )
        if swap == 199:
            gc.collect()
            memory = process.memory_info().rss
    gc.collect()
    grown = process.memory_info().rss - memory
    assert grown < 8 * 2**20, f"800 swaps of a 40 kB adapter left {grown:,} bytes"
