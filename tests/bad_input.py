"""Hostile adapter folders and wrong uses, by name; test_errors.py runs each and keeps its message."""

import json
import pickle

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dynlora import DynLoraConfig, RankAllocator, dem_loss, export_lora, finalize_, warm_start_
from small_net import adamw, adapted, attached, small_net, train
from wrong_settings import REFUSED

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.layers.1."


class RunsCode:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def rewrite(change, metadata=None):
    """A hostile folder whose tensors are ``change``d."""

    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata or {"format": "pt"})

    return spoil


def put(key, value):
    return rewrite(lambda tensors: tensors.update({key: value}))


def put_dropped(module):
    """An entry for a module of rank 0."""
    parts = {"lora_ema": torch.ones(0), "lora_live": torch.ones(0, dtype=torch.bool)}
    return rewrite(lambda tensors: tensors.update({module + "." + k: v for k, v in parts.items()}))


def fill(part, value):
    return rewrite(lambda tensors: tensors[KEY + part].view(-1)[:1].fill_(value))


def drop(*parts):
    return rewrite(lambda tensors: [tensors.pop(KEY + part) for part in parts])


def configure(**fields):
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **fields}))

    return spoil


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(share):
    def spoil(folder):
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])

    return spoil


def header(change):
    """Rewrite the JSON header of the safetensors file, leaving its data."""

    def spoil(folder):
        content = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(content[:8], "little")
        fields = json.loads(content[8 : 8 + size])
        change(fields)
        new = json.dumps(fields).encode()
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])

    return spoil


def pickled(name):
    def spoil(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(RunsCode(folder.parent / "trace"), protocol=2))

    return spoil


def without_weights(folder):
    (folder / WEIGHTS).unlink()


def plain_tensors(tensors):
    for key in list(tensors):
        if key.endswith((".c", "ema", "live")):
            del tensors[key]


def of_other_ranks(tensors):
    tensors[KEY + "lora_A.c"] = torch.ones(7)


HOSTILE = {
    "weights cut in half": cut(0.5),
    "weights cut in their header": cut(0.01),
    "weights empty": text(WEIGHTS, b""),
    "weights are text": text(WEIGHTS, b"<html>404 Not Found</html>"),
    "weights missing": without_weights,
    "weights are a pickle under this name": pickled(WEIGHTS),
    "weights are a pickle": pickled("adapter_model.bin"),
    "weights are a pickle of a list": lambda folder: (
        (folder / WEIGHTS).unlink(),
        torch.save([1], folder / "adapter_model.bin"),
    ),
    "header of a huge size": text(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
    "tensor of a huge declared shape": header(
        lambda h: h[KEY + "lora_A.weight"].update(shape=[2**40, 7])
    ),
    "tensor beyond the end of the file": header(
        lambda h: h[KEY + "lora_A.weight"].update(data_offsets=[0, 2**50])
    ),
    "tensors that overlap": header(
        lambda h: h[KEY + "lora_A.weight"].update(h[KEY + "lora_B.weight"])
    ),
    "tensor of an unknown dtype": header(lambda h: h[KEY + "lora_A.c"].update(dtype="F3")),
    "gate of NaN": fill("lora_A.c", float("nan")),
    "gate of infinity": fill("lora_A.c", float("inf")),
    "factor A of NaN": fill("lora_A.weight", float("nan")),
    "factor B of infinity": fill("lora_B.weight", float("-inf")),
    "scores of NaN": fill("lora_ema", float("nan")),
    "mask of numbers": put(KEY + "lora_live", torch.ones(4)),
    "gate of integers": put(KEY + "lora_A.c", torch.ones(4, dtype=torch.int64)),
    "factor of complex numbers": put(
        KEY + "lora_A.weight", torch.ones(4, 7, dtype=torch.complex64)
    ),
    "gate of another rank": rewrite(of_other_ranks),
    "gate missing": drop("lora_A.c"),
    "scores and mask missing": drop("lora_ema", "lora_live"),
    "factor A missing": drop("lora_A.weight"),
    "factor A is a vector": put(KEY + "lora_A.weight", torch.ones(4)),
    "module missing": drop("lora_A.c", "lora_A.weight", "lora_B.weight", "lora_ema", "lora_live"),
    "factors too wide": put(KEY + "lora_A.weight", torch.ones(4, 8)),
    "factors too tall": put(KEY + "lora_B.weight", torch.ones(6, 4)),
    "module that is not in the model": put_dropped("base_model.model.layers.9"),
    "no adapter in the weights": rewrite(lambda t: (t.clear(), t.update(x=torch.ones(1)))),
    "plain LoRA under our name": rewrite(plain_tensors),
    "unknown part of a newer version": put(KEY + "lora_d.weight", torch.ones(4)),
    "weight of the base model": put(KEY + "base_layer.weight", torch.ones(5, 7)),
    "weight of the base model by its own name": put(
        "base_model.model.layers.1.bias", torch.ones(5)
    ),
    "path in a name": put("../../../etc/passwd", torch.ones(1)),
    "path in a module's name": put_dropped("base_model.model.../../x"),
    "config cut in half": text(CONFIG, b'{"peft_type": "DYN'),
    "config is a list": text(CONFIG, b"[]"),
    "config is not UTF-8": text(CONFIG, b'{"peft_type": "\xff\xfe"}'),
    "config nested without end": text(CONFIG, b'{"a":' * 100_000),
    "config of an unknown method": configure(peft_type="NOSUCH"),
    "config with a huge rank": configure(init_r=10**9),
    "config with a huge rank of one module": configure(rank_pattern={"1": 10**12}),
    "config with a rank of text": configure(rank_pattern={"1": "many"}),
    "config with alpha of NaN": configure(lora_alpha=float("nan")),
    "config with a negative alpha": configure(alpha_pattern={"1": -3}),
    "config with dropout above 1": configure(lora_dropout=7),
    "config with a broken expression": configure(target_modules="(0|1|2"),
    "config with a broken pattern": configure(rank_pattern={"(": 3}),
    "config that targets everything": configure(target_modules="all-linear"),
    "config that targets a number": configure(target_modules=5),
    "config with a broken exclusion": configure(exclude_modules="["),
    "config without targets": configure(target_modules=None),
    "config with a bias of its own": configure(bias="mine"),
    "config that imports a module": configure(
        megatron_config={"a": 1}, megatron_core="antigravity"
    ),
    "config of NVIDIA's DoRA": configure(use_dora=True),
    "config with a path to save": configure(modules_to_save={"../x": 1}),
}


def plain_lora(**fields):
    return get_peft_model(small_net(), LoraConfig(r=3, target_modules=["0", "1"], **fields))


def past_the_end(_folder):
    model, optimizer, _ = attached(total_steps=2)
    train(model, optimizer, 3)


def optimizer_of_something_else(_folder):
    model = adapted()
    RankAllocator(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), total_steps=5)


def export_to_a_file(folder):
    model, optimizer, _ = attached()
    train(model, optimizer, 3)
    (folder / "file").write_text("mine")
    export_lora(model, folder / "file")


def frozen(model):
    return model.requires_grad_(False)


def grouped_convolution(_folder):
    net = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    get_peft_model(net, DynLoraConfig(target_modules=["0"]))


WRONG_USES = {
    "no target matches": lambda _: adapted(target_modules=["nowhere"]),
    "budget above the start": lambda _: attached(rank_pattern={"0": 1}, target_r=4),
    "no number of steps": lambda _: RankAllocator(m := adapted(), adamw(m)),
    "two numbers of steps": lambda _: attached(total_steps=8)[0] and attached_twice(),
    "no adapter": lambda _: RankAllocator(n := small_net(), adamw(n), total_steps=5),
    "a plain LoRA": lambda _: RankAllocator(m := plain_lora(), adamw(m), total_steps=5),
    "frozen adapter": lambda _: RankAllocator(
        frozen(adapted()), adamw(plain_lora()), total_steps=5
    ),
    "optimizer of something else": optimizer_of_something_else,
    "optimizer that is none": lambda _: RankAllocator(adapted(), "adamw", total_steps=5),
    "no allocator": lambda _: train(m := adapted(), adamw(m), 1),
    "another optimizer": lambda _: train((m := attached()[0]), adamw(m), 1),
    "steps past the end": past_the_end,
    "finalize before a step": lambda _: attached()[2].finalize_(),
    "freeze before a step": lambda _: attached()[2].freeze_(),
    "finalize an untrained adapter": lambda _: finalize_(adapted()),
    "finalize a plain LoRA": lambda _: finalize_(plain_lora()),
    "finalize another name": lambda _: finalize_(adapted(), "other"),
    "penalty without an adapter": lambda _: dem_loss(small_net()),
    "export an untrained adapter": lambda folder: export_lora(adapted(), folder / "out"),
    "export onto a file": export_to_a_file,
    "export a model without an adapter": lambda folder: export_lora(small_net(), folder / "out"),
    "warm start of a frozen LoRA": lambda _: warm_start_(frozen(plain_lora()), target_r=2),
    "warm start above the rank": lambda _: warm_start_(plain_lora(), target_r=5),
    "warm start of NVIDIA's DoRA": lambda _: warm_start_(plain_lora(use_dora=True), target_r=2),
    "warm start of a DynLora": lambda _: warm_start_(adapted(), target_r=2),
    "weighted adapters": lambda _: adapted().add_weighted_adapter(["default"], [1.0], "new"),
    "grouped convolution": grouped_convolution,
    "state of nothing": lambda _: attached()[2].load_state_dict({}),
    "state that is a list": lambda _: attached()[2].load_state_dict([1]),
    **{
        f"config {fields}": (lambda _, fields=fields: DynLoraConfig(**fields))
        for fields, _ in REFUSED
    },
}


def attached_twice():
    model = adapted(total_steps=9)
    return RankAllocator(model, adamw(model), total_steps=8)
