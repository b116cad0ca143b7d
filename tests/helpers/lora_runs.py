"""A tiny Llama with a stock LoRA on every linear layer, and runs that end at chosen ragged ranks."""

import itertools

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from dynlora import DynLoraCallback, RankAllocator
from tiny_classifier import SPECIAL, WORDS, tiny_tokenizer

R, ALPHA = 4, 8
MODULES = 14
ENDS = list(itertools.islice(itertools.cycle([0, 1, 2, 4]), MODULES))
"""The final rank of each module in model order: 0 and the whole rank are among them."""


LINEARS = [
    f"model.layers.{i}.{name}"
    for i in (0, 1)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


def ends(modules, _step):
    """A score by which each module keeps its first ``ENDS`` components."""
    wanted = dict(zip(LINEARS, ENDS, strict=True))
    for module in modules:
        module.ema = (torch.arange(module.rank) < wanted[module.name]).float()


SETTINGS = {
    "target_r": sum(ENDS) / MODULES,
    "budget": "components",
    "score": ends,
    "prune_start": 0.2,
    "prune_end": 0.5,
    "prune_interval": 1,
}


def base(**fields):
    set_seed(0)
    sizes = {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | fields))


def config(**fields):
    defaults = {
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**defaults | fields)


def adapted(**fields):
    return get_peft_model(base(), config(**fields))


def ids(seed=1):
    return torch.randint(4, 10, (4, 6), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    was_training = model.training
    found = model.eval()(input_ids=ids(9)).logits
    model.train(was_training)
    return found


def ranks_of(model, adapter="default"):
    """Rank by module, of the modules that hold the adapter."""
    return {
        name: module.r[adapter]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and adapter in module.lora_A
    }


def train(model, *, steps=10, lr=1e-2, forward=None, each=None, **settings):
    """A plain loop of 10 steps that freezes after the fifth; returns the allocator and the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    allocator = RankAllocator(model, optimizer, total_steps=10, **SETTINGS | settings)
    losses = []
    model.train()
    for step in range(steps):
        inputs = ids(step)
        loss = (forward or model)(input_ids=inputs, labels=inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if each is not None:
            each(allocator)
    return allocator, losses


def finished(seed=0):
    """A model whose run has ended at ``ENDS``."""
    model = adapted()
    set_seed(seed)
    train(model)[0].finalize_()
    return model.eval()


def dataset(rows=16):
    rows = [ids(i)[0].tolist() for i in range(rows)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def arguments(folder, **fields):
    defaults = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **defaults | fields)


def callback(**settings):
    return DynLoraCallback(**SETTINGS | settings)


def trainer(folder, *, model=None, callbacks=(), also=(), model_init=None, **fields):
    return Trainer(
        model=model,
        model_init=model_init,
        args=arguments(folder, **fields),
        train_dataset=dataset(),
        eval_dataset=dataset(rows=4),
        callbacks=[*callbacks, *also],
    )


def losses(a_trainer):
    return [entry["loss"] for entry in a_trainer.state.log_history if "loss" in entry]


def save_language_model(folder):
    """The base model and its tokenizer in a folder, for trainers that load both; its name."""
    base().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    tokenizer.save_pretrained(folder)
    return str(folder)
