"""PEFT's starts of a LoRA by their names, each driven as PEFT's documentation says."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

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
from dynlora_lab.methods.config_fields import component_sizes, joined_names
from dynlora_lab.methods.options import AdapterOptions

GRADIENT_BATCHES = 8
"""Batches that LoRA-GA averages its gradient over, as in the example of PEFT's documentation."""


def with_start(options: AdapterOptions, target: Target, fields: Mapping[str, Any]) -> PeftModel:
    """The target's model with a LoRA from the start that ``options.init_lora_weights`` names.

    EVA's ranks differ from module to module; it redistributes components, so that their sum stays. A
    model without weights gets PEFT's default start: there is nothing to decompose.

    Args:
        options: of the recipe.
        target: the model, and the batches that EVA and LoRA-GA look at.
        fields: of LoraConfig.
    """
    model = target.model
    start = options.init_lora_weights
    if next(model.parameters()).is_meta:
        start = True
    config = LoraConfig(init_lora_weights=start, use_rslora=options.use_rslora, **fields)
    if start == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        if config.target_modules == "all-linear":  # PEFT's function for it knows names only
            config.target_modules = joined_names(component_sizes(options, target))
        preprocess_loraga(model, config, lambda: _accumulate(model, target))
    if start != "eva":
        return get_peft_model(model, config)
    config.eva_config = EvaConfig()
    adapted = get_peft_model(model, config)
    initialize_lora_eva_weights(
        adapted,
        target.batches(adapted),
        prepare_model_inputs_fn=_counted_tokens,
        prepare_layer_inputs_fn=_rows,
        show_progress_bar=False,
    )
    return adapted


def _accumulate(model: nn.Module, target: Target) -> None:
    for batch in islice(target.batches(model), GRADIENT_BATCHES):
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
