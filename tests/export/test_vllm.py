"""vLLM itself on our adapters: both forms answer as PEFT does, and not as the base.

``VLLM_PYTHON`` names the Python of an environment with vLLM, which asks for another transformers than ours.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dynlora import RankAllocator
from dynlora.export import export_adapter

PYTHON = os.environ.get("VLLM_PYTHON")
WORKER = Path(__file__).parent.parent / "helpers" / "worker_vllm.py"
STEPS, NEW_TOKENS, VOCABULARY = 30, 12, 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM"),
]


def random_llama():
    """Heads of 64, because vLLM's kernels for a CPU know no smaller ones."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trained(folder, ids):
    """Write the base and an adapter with pruned modules that has learned ``ids``."""
    base = random_llama()
    base.save_pretrained(folder / "base")
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, target_r=2, prune_interval=2)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(allocator.finalize_().values()) | {0}) > 2
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "trained")


def answers(model, prompts):
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    made = (model.eval().generate(input_ids=torch.tensor([ids]), **settings) for ids in prompts)
    return [row[0, len(ids) :].tolist() for row, ids in zip(made, prompts, strict=True)]


def test_both_forms_answer_as_peft_does_and_not_as_the_base(tmp_path):
    draws = torch.Generator().manual_seed(0)
    trained(tmp_path, torch.randint(4, VOCABULARY, (8, 16), generator=draws))
    prompts = torch.randint(4, VOCABULARY, (4, 7), generator=draws).tolist()
    forms = {form: str(tmp_path / form) for form in ("ragged", "uniform")}
    for form, folder in forms.items():
        export_adapter(tmp_path / "trained", folder, to=form, base=str(tmp_path / "base"))
    expected = answers(PeftModel.from_pretrained(random_llama(), forms["ragged"]), prompts)
    words = [
        PYTHON,
        "-W",
        "ignore",
        WORKER,
        tmp_path / "base",
        json.dumps(prompts),
        str(NEW_TOKENS),
    ]
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": "",
    }
    ran = subprocess.run(
        [*words, *forms.values()], check=True, capture_output=True, text=True,
        env=os.environ | settings | {"VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip
    base, ragged, uniform = json.loads(ran.stdout.splitlines()[-1])
    assert base == answers(random_llama(), prompts)
    assert ragged == uniform == expected
    assert all(one != other for one, other in zip(base, ragged, strict=True))
