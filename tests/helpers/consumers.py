"""How other programs read a PEFT LoRA folder, as rules: folder in, ΔW by module name out.

Written from the sources of vLLM 0.33, SGLang 0.5.23, LoRAX, TGI, llama.cpp, diffusers and MLX-LM (facts
only). A rule raises RefusedError where the program would refuse to load.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

PREFIX = "base_model.model."
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class RefusedError(Exception):
    """The program would not load the adapter."""


def config_of(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def pairs(folder):
    """A and B by module name."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    names = sorted({key.rpartition(".lora_A.weight")[0] for key in tensors} - {""})
    return {
        name.removeprefix(PREFIX): (
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
        )
        for name in names
    }


def pattern_value(pattern, name, default):
    hits = (v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(hits, default)


def vllm(folder):
    """Both patterns are read; the largest rank must be one of the allowed maxima."""
    config = config_of(folder)
    for name in ("use_dora", "modules_to_save", "lora_bias"):
        if config.get(name):
            raise RefusedError(name)
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    largest = max([config["r"], *ranks.values()])
    if min([config["r"], *ranks.values()]) <= 0 or largest > VLLM_MAX_RANKS[-1]:
        raise RefusedError(f"rank {largest}")
    return {
        name: b @ a * (pattern_value(alphas, name, config["lora_alpha"])
                       / pattern_value(ranks, name, config["r"]))
        for name, (a, b) in pairs(folder).items()
    }  # fmt: skip


def vllm_before_patterns(folder):
    """One scale, alpha / r; ranks from the tensors."""
    config = config_of(folder)
    scale = config["lora_alpha"] / config["r"]
    return {name: b @ a * scale for name, (a, b) in pairs(folder).items()}


def sglang(folder):
    """Buffers of rank r; q_proj must be there if k_proj or v_proj is; a list of targets."""
    config = config_of(folder)
    if isinstance(config["target_modules"], str):
        raise RefusedError("target_modules is no list")
    named = pairs(folder)
    for name, (a, b) in named.items():
        if a.shape[0] != config["r"] or b.shape[1] != config["r"]:
            raise RefusedError(f"{name} has rank {a.shape[0]}, not r={config['r']}")
        if name.endswith(("k_proj", "v_proj")) and f"{name[:-6]}q_proj" not in named:
            raise RefusedError(f"{name} without q_proj")
    scale = config["lora_alpha"] / config["r"]
    return {name: b @ a * scale for name, (a, b) in named.items()}


def lorax(folder):
    """Layers of a kind are stacked; a kind that one layer lacks is dropped in silence. TGI: the same."""
    config, named = config_of(folder), pairs(folder)
    if config["r"] % 8:
        raise RefusedError(f"r={config['r']} is no multiple of 8")
    layers = {m[1] for name in named if (m := re.search(r"\.(\d+)\.", name))}
    kinds = defaultdict(dict)
    for name, pair in named.items():
        kinds[re.sub(r"\.\d+\.", ".#.", name)][name] = pair
    scale = config["lora_alpha"] / config["r"]
    deltas = {}
    for members in kinds.values():
        if len(members) < len(layers):
            continue
        try:
            stacked = [torch.stack(factors) for factors in zip(*members.values(), strict=True)]
        except RuntimeError as error:
            raise RefusedError(str(error)) from error
        deltas |= {n: b @ a * scale for n, a, b in zip(members, *stacked, strict=True)}
    return deltas


def llama_cpp(folder):
    """The converter keeps one alpha, the runtime divides it by each tensor's rank; alpha 0 means 1.

    It ends at a tensor that is neither A nor B, norms excepted.
    """
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  # no mapping
            if not any(part in key for part in (".lora_A.weight", ".lora_B.weight", "norm")):
                raise RefusedError(key)
    alpha = config_of(folder)["lora_alpha"]
    return {
        name: b @ a * (alpha / b.shape[1] if alpha else 1.0)
        for name, (a, b) in pairs(folder).items()
    }


def diffusers(folder):
    """Alphas are not in the file, so each is taken to be its tensor's rank."""
    return {name: b @ a for name, (a, b) in pairs(folder).items()}


def mlx(folder):
    """lora_parameters has one rank and one scale; weights must have exactly these shapes."""
    config = config_of(folder)
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    named = pairs(folder)
    for name, (a, _) in named.items():
        if a.shape[0] != rank:
            raise RefusedError(f"{name} has rank {a.shape[0]}, not {rank}")
    return {name: (a.T @ b.T * scale).T for name, (a, b) in named.items()}
