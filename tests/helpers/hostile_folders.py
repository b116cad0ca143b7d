"""Hostile folders of gated adapters, by name; test_errors.py loads each and keeps its message."""

import json
import pickle

import torch
from safetensors.torch import load_file, save_file

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


def put_module(name):
    """The factors and the gate of one more module."""
    parts = {"A.weight": torch.ones(4, 7), "B.weight": torch.ones(5, 4), "A.c": torch.ones(4)}
    return rewrite(
        lambda tensors: tensors.update({f"{name}.lora_{k}": v for k, v in parts.items()})
    )


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


def list_pickled(folder):
    without_weights(folder)
    torch.save([1], folder / "adapter_model.bin")


def plain_tensors(tensors):
    for key in list(tensors):
        if key.endswith(".c"):
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
    "weights are a pickle of a list": list_pickled,
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
    "gate of integers": put(KEY + "lora_A.c", torch.ones(4, dtype=torch.int64)),
    "factor of complex numbers": put(
        KEY + "lora_A.weight", torch.ones(4, 7, dtype=torch.complex64)
    ),
    "gate of another rank": rewrite(of_other_ranks),
    "gate missing": drop("lora_A.c"),
    "factor A missing": drop("lora_A.weight"),
    "factor A is a vector": put(KEY + "lora_A.weight", torch.ones(4)),
    "module missing": drop("lora_A.c", "lora_A.weight", "lora_B.weight"),
    "factors too wide": put(KEY + "lora_A.weight", torch.ones(4, 8)),
    "factors too tall": put(KEY + "lora_B.weight", torch.ones(6, 4)),
    "module that is not in the model": put_module("base_model.model.layers.9"),
    "no adapter in the weights": rewrite(lambda t: (t.clear(), t.update(x=torch.ones(1)))),
    "plain LoRA under our name": rewrite(plain_tensors),
    "unknown part of a newer version": put(KEY + "lora_d.weight", torch.ones(4)),
    "weight of the base model": put(KEY + "base_layer.weight", torch.ones(5, 7)),
    "weight of the base model by its own name": put(
        "base_model.model.layers.1.bias", torch.ones(5)
    ),
    "path in a name": put("../../../etc/passwd", torch.ones(1)),
    "path in a module's name": put_module("base_model.model.../../x"),
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
    "config that trains tokens which the weights lack": configure(trainable_token_indices=[1]),
    "config with a path to save": configure(modules_to_save={"../x": 1}),
}
