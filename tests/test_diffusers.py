"""An exported adapter in diffusers: a tiny UNet loads it and computes the same."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is a consumer, not a dependency")

from diffusers import UNet2DConditionModel
from peft import get_peft_model
from safetensors.torch import load_file

from dynlora import DynLoraConfig, RankAllocator
from dynlora.export import export_adapter


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def output(model):
    draws = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 2, 4, 4, generator=draws), torch.randn(1, 3, 8, generator=draws)
    return model(x, torch.tensor([3]), encoder_hidden_states=text).sample


@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_diffusers_computes_what_was_trained(tmp_path, form):
    config = DynLoraConfig(
        init_r=4,
        target_r=2,
        prune_interval=2,
        target_modules=["to_q", "to_v", "to_out.0"],
        importance="share",  # no module falls to rank 0: without the base its shape would be unknown
    )
    model = get_peft_model(unet(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    allocator = RankAllocator(model, optimizer, total_steps=10)
    for _ in range(10):
        loss = output(model).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    allocator.finalize_()
    model.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", to=form)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    fresh = unet()
    before = output(fresh).detach()
    fresh.load_lora_adapter(
        {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, prefix=None
    )
    with torch.no_grad():
        torch.testing.assert_close(output(fresh), output(model), rtol=0, atol=1e-5)
        assert (output(fresh) - before).abs().max() > 1e-4
