"""A finished adapter in diffusers: a tiny UNet loads it and computes the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from dynlora import RankAllocator
from dynlora.export import export_adapter


def unet():
    diffusers = pytest.importorskip("diffusers", reason="a consumer, not a dependency")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def output(model):
    draws = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 2, 4, 4, generator=draws), torch.randn(1, 3, 8, generator=draws)
    return model(x, torch.tensor([3]), encoder_hidden_states=text).sample


@pytest.mark.slow
def test_diffusers_computes_what_was_trained(tmp_path):
    model = get_peft_model(
        unet(), LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "to_out.0"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    # min_r=1: without the base the shape of a module of rank 0 would be unknown
    allocator = RankAllocator(
        model, optimizer, total_steps=10, target_r=2, min_r=1, prune_interval=2
    )
    for _ in range(10):
        loss = output(model).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(set(allocator.finalize_().values())) > 1
    model.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", to="uniform")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    fresh = unet()
    before = output(fresh).detach()
    fresh.load_lora_adapter(
        {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, prefix=None
    )
    with torch.no_grad():
        torch.testing.assert_close(output(fresh), output(model), rtol=0, atol=1e-5)
        assert (output(fresh) - before).abs().max() > 1e-4
