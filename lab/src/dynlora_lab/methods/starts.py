"""PEFT's starts of a LoRA by their names, each driven as PEFT's documentation says, and one of ours."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import preprocess_loraga
from torch import Tensor, nn

from dynlora_lab.methods.adapted import Target
from dynlora_lab.methods.before_training import first_batches
from dynlora_lab.methods.config_fields import component_sizes, joined_names
from dynlora_lab.methods.gradient_start import right_singular_vectors, start_along_
from dynlora_lab.methods.options import AdapterOptions


def with_start(options: AdapterOptions, target: Target, fields: Mapping[str, Any]) -> PeftModel:
    """The target's model with a LoRA from the start that ``options.init_lora_weights`` names.

    EVA's ranks differ from module to module; it redistributes components, so that their sum stays. A
    model without weights gets PEFT's default start: there is nothing to decompose.

    Args:
        options: of the recipe.
        target: the model, and the batches that EVA, LoRA-GA and ``gradient`` look at.
        fields: of LoraConfig.
    """
    model = target.model
    start = options.init_lora_weights
    if next(model.parameters()).is_meta:
        start = True
    if start == "gradient":
        return _along_the_gradient(options, target, fields)
    config = LoraConfig(
        init_lora_weights=start,
        eva_config=EvaConfig() if start == "eva" else None,
        lora_ga_config=LoraGAConfig() if start == "lora_ga" else None,
        use_rslora=options.use_rslora,
        **fields,
    )
    if start == "lora_ga":
        if config.target_modules == "all-linear":  # PEFT's function for it knows names only
            config.target_modules = joined_names(component_sizes(options, target))
        preprocess_loraga(model, config, lambda: _accumulate(model, target))
    if start != "eva":
        return get_peft_model(model, config)
    batches = target.batches()  # before weights are left out, as a Trainer places the model
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)  # as PEFT asks for with EVA
    initialize_lora_eva_weights(
        adapted,
        batches,
        prepare_model_inputs_fn=_counted_tokens,
        prepare_layer_inputs_fn=_rows,
        show_progress_bar=False,
    )
    return adapted


def _along_the_gradient(
    options: AdapterOptions, target: Target, fields: Mapping[str, Any]
) -> PeftModel:
    """PEFT's default start, with A replaced by directions of the loss's gradient."""
    rank = max(fields.get("rank_pattern", {}).values(), default=fields.get("r", 0))
    directions = right_singular_vectors(target, fields, rank=rank)
    adapted = get_peft_model(target.model, LoraConfig(use_rslora=options.use_rslora, **fields))
    start_along_(adapted, directions)
    return adapted


def plain_saver(model: PeftModel) -> Callable[[Path], object]:
    """A function that writes a plain LoRA of twice the rank for the base as it was: B A − B₀ A₀.

    PEFT's own conversion (``path_initial_model_for_weight_conversion``) leaves a trained head out of the
    file in 0.21.2, which then does not load. Without any, LoRA-GA's gradient would be missing at loading.

    Args:
        model: with an adapter as it starts.
    """
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    def save(folder: Path) -> None:
        state = model.state_dict()
        for name, first in start.items():
            is_b = "lora_B" in name
            state[name] = torch.cat([state[name], -first if is_b else first], dim=int(is_b))
        config = model.peft_config["default"]
        model.peft_config["default"] = _doubled(config)
        model.save_pretrained(folder, state_dict=state)
        model.peft_config["default"] = config

    return save


def _doubled(config: LoraConfig) -> LoraConfig:
    """The config of an adapter of twice the rank and the same scaling, from PEFT's default start."""
    by = 2**0.5 if config.use_rslora else 2
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=by * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: 2 * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        lora_ga_config=None,
    )


def _accumulate(model: nn.Module, target: Target) -> None:
    for batch in first_batches(target):
        model(**batch).loss.backward()


def _counted_tokens(inputs: Mapping[str, Tensor], _config: LoraConfig) -> Tensor | None:
    """Which tokens count, (rows, tokens): no padding, and none whose label is ignored; None for pictures.

    PEFT's own function takes labels for those of tokens, which they are not in a classifier.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    labels = inputs.get("labels")
    if labels is None or labels.shape != mask.shape:
        return mask.bool()
    return mask.bool() & (labels != -100)


def _rows(layer_input: Any, counted: Tensor | None, _name: str) -> Tensor:
    """The inputs of a layer, (rows, features); a layer that sees no tokens (a pooler) gives all."""
    inputs = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    if counted is None or inputs.shape[:2] != counted.shape or inputs.ndim < 3:
        return inputs.flatten(0, -2).contiguous()  # PEFT views it as one row
    return inputs[counted]
