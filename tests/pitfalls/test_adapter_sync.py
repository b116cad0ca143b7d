"""A server that is handed the adapter alone while it is trained, as TRL's asynchronous GRPO does."""

import importlib

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel

from consumers import config_of, pairs, vllm
from lora_runs import R, adapted, base, logits, train

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def trl_sync():
    """TRL's functions for it; importing them warns that they are experimental."""
    return importlib.import_module("trl.experimental.async_grpo.async_grpo_trainer")


class Server:
    """Takes adapters of known modules up to ``max_lora_rank``, whose ranks the config must tell."""

    def __init__(self, max_lora_rank):
        self.max_lora_rank = max_lora_rank
        self.updates = []

    def load(self, folder):
        config = config_of(folder)
        largest = max([config["r"], *config["rank_pattern"].values()])
        assert largest <= self.max_lora_rank, "vLLM refuses the adapter by its config"
        for a, b in pairs(folder).values():
            assert a.shape[0] == b.shape[1] <= self.max_lora_rank
        self.updates.append(vllm(folder))


def test_the_adapter_can_be_handed_over_after_every_step(tmp_path, trl_sync):
    model, accelerator = adapted(), Accelerator(cpu=True)
    server = Server(trl_sync.round_lora_rank(R))
    sizes = []

    def hand_over(allocator):
        trl_sync.validate_lora_for_vllm_sync(model)
        folder = tmp_path / f"v{allocator.step}"
        trl_sync.save_lora_adapter(model, accelerator, "default", str(folder))
        server.load(folder)
        loaded = PeftModel.from_pretrained(base(), folder)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
        sizes.append(sum(a.numel() + b.numel() for a, b in pairs(folder).values()))

    train(model, each=hand_over)
    modules = dict(model.get_base_model().named_modules())
    for name, update in server.updates[-1].items():
        torch.testing.assert_close(update, modules[name].get_delta_weight("default"))
    assert len(server.updates) == 10
    assert sizes[3] == sizes[0] > sizes[4] == sizes[9]  # shapes shrink once, at the freeze


def test_the_rank_that_the_server_needs_is_known_before_training_and_never_grows():
    model = adapted()
    needed = []

    def note(_allocator):
        config = model.peft_config["default"]
        needed.append(max([config.r, *config.rank_pattern.values()]))

    train(model, each=note)
    assert needed == [R] * 10
