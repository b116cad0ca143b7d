"""A tiny classifier, and methods on it."""

import torch
from transformers import BertConfig, BertForSequenceClassification, set_seed

from dynlora_lab.methods import METHODS, AdapterOptions, Target

HEAD = ["classifier"]
OPTIONS = AdapterOptions(target_r=2)
BATCH = {"input_ids": torch.arange(12).reshape(2, 6)}


def tiny():
    set_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def batches(num=10):
    """Of eight rows each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (num, 8, 6), generator=generator)
    mask = torch.ones(8, 6, dtype=torch.long)
    return [{"input_ids": i, "attention_mask": mask, "labels": i[:, 0] % 3} for i in ids]


def target_of(model=None):
    return Target(model=model or tiny(), head=HEAD, task_type="SEQ_CLS", seed=0, batches=batches)


def adapted(method, options=OPTIONS, model=None):
    target = target_of(model)
    return METHODS[method](options, target)


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def scalings(model):
    return {
        module.scaling["default"]
        for module in model.modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
