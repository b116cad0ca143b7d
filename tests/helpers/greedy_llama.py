"""A random Llama, an adapter that has learned something by heart, and greedy answers: for servers.

Large enough for what servers ask for (heads of 64), and its answers have no near ties.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dynlora import RankAllocator
from dynlora.export import export_adapter

FORMS = ("ragged", "uniform")
STEPS, NEW_TOKENS = 30, 12


def random_llama(vocabulary):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_forms(folder, vocabulary):
    """The base, and both forms of an adapter with pruned modules; gives prompts back."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (8, 16), generator=draws)
    base = random_llama(vocabulary)
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
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
    for form in FORMS:
        export_adapter(folder / "trained", folder / form, to=form, base=str(folder / "base"))
    return torch.randint(4, vocabulary, (4, 7), generator=draws).tolist()


def answers(model, prompts, **settings):
    """Greedy tokens, as transformers and PEFT give them."""
    settings |= {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    made = (model.eval().generate(input_ids=torch.tensor([ids]), **settings) for ids in prompts)
    return [row[0, len(ids) :].tolist() for row, ids in zip(made, prompts, strict=True)]
