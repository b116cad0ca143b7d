"""PEFT's own tests of custom models, told that LoRA is DynLora.

scripts/peft_suite.py copies this file as conftest.py beside PEFT's test_custom_models.py and runs that
file. While it is imported, ``peft.LoraConfig`` is a DynLoraConfig, so its tests and their tables of
configs use ours wherever they meant LoRA. Tests and rows that are not about LoRA are left out.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any
from unittest import mock

import peft
import pytest
import torch

from dynlora import DynLoraConfig

_HUB = "needs a model from the hub"
_WEIGHTED = "add_weighted_adapter is refused: it would ignore the gates"
_NAME = "compares the name of the stock class with that of its subclass"
_MIXED = "PeftMixedModel has a fixed list of methods"
_CUSTOM = "its custom layer has no lora_A to gate, which is refused"
SKIPPED = {
    "test_add_adapter_rejects_duplicate_name_without_mutation[True]": _MIXED,
    "test_add_weighted_adapter_cat_with_rank_pattern": _WEIGHTED,
    "test_add_weighted_adapter_negative_weight_negates_adapter": _WEIGHTED,
    "test_add_weighted_adapter_negative_weight_with_different_scaling": _WEIGHTED,
    "test_add_weighted_adapter_subtraction_with_negative_weights": _WEIGHTED,
    "test_add_weighted_adapter_with_different_scaling": _WEIGHTED,
    "test_multiple_adapters_mixed_modules_to_save_merging_adapters": _WEIGHTED,
    "test_multiple_adapters_same_modules_to_save_merging_adapters_raises": _WEIGHTED,
    "test_delete_adapter_multiple_adapters_with_trainable_token_indices": _HUB,
    "test_dora_save_and_load_remapping": _HUB,
    "test_gpt2_dora_merge_and_unload": _HUB,
    "test_gpt2_dora_merge_and_unload_safe_merge": _HUB,
    "test_multiple_adapters_automatic_modules_to_save": _HUB,
    "test_multiple_adapters_no_needless_copy_modules_to_save": _HUB,
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters": _HUB,
    "test_override_lora_linear": _HUB,
    "test_mixed_adapter_batches_mha_raises": _NAME,
    "test_repr_lora_conv1d": _NAME,
    "test_repr_lora_conv2d": _NAME,
    "test_repr_lora_embedding": _NAME,
    "test_repr_lora_linear": _NAME,
    "test_target_layer_without_in_features_out_features": _CUSTOM,
}
"""Why a test of PEFT's does not apply, by name; a name with brackets is one row of the test."""

LEARNING_RATES = {
    "test_only_params_are_updated": {"EmbConv1D": 100.0},
    "test_parameters_after_loading_model": {"MLP": 0.01},
}
"""SGD's rate by test and model, where PEFT's is tuned to factors that start at B = 0.

Ours start at c = 0, so A and B move a step later, and both are as large as A is there. PEFT's file
makes the same two concessions to other methods.
"""

REFUSALS = ("cannot be combined with dynlora", "init_lora_weights=")
"""In the messages by which DynLoraConfig refuses variants of LoRA, by design."""

GROUPED = ("Conv2dGroups", "Conv2dGroups2")
"""PEFT's models with grouped convolutions, which dynlora refuses to adapt."""


class DynLoraAsLora(DynLoraConfig):  # type: ignore[misc]  # a dataclass with another __init__
    """A DynLoraConfig written like a LoraConfig: init_r = target_r = r, so nothing is pruned.

    With something to prune, training without a RankAllocator would be refused, and rightly so.
    """

    def __init__(self, *, r: int = 8, **options: Any) -> None:
        """Translate ``r``; skip a test that asks for a variant of LoRA that dynlora refuses."""
        try:
            super().__init__(**({"init_r": r, "target_r": r} | options))
        except ValueError as error:
            if any(text in str(error) for text in REFUSALS):
                pytest.skip(str(error))
            raise


def stand_in_for_diffusers() -> ModuleType:
    """A module with the one class that PEFT's testing_common imports for an isinstance check."""
    module: Any = ModuleType("diffusers")
    module.__spec__ = ModuleSpec("diffusers", None)
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    return module


def names_in(code: CodeType) -> set[str]:
    """The global names and attributes that a function uses, inner functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(names_in, inner))


def mentions(row: Any, config: type) -> bool:
    """Whether a row of a parametrised test holds a subclass or an instance of ``config``."""
    return any(
        isinstance(value, config) or (inspect.isclass(value) and issubclass(value, config))
        for value in (row if isinstance(row, tuple) else (row,))
    )


def is_supported(row: Any) -> bool:
    """Whether dynlora accepts the options and the model of a row."""
    for value in row if isinstance(row, tuple) else ():
        if value in GROUPED:
            return False
        if isinstance(value, dict):
            try:
                DynLoraAsLora(**value)
            except pytest.skip.Exception:
                return False
    return True


def renamed(row: Any) -> Any:
    """A row whose method is not called "lora", or its test would add weighted adapters."""
    is_named = isinstance(row, tuple) and "lora" in row
    return tuple("dynlora" if value == "lora" else value for value in row) if is_named else row


def keep_rows_of_lora(test: Callable[..., None]) -> bool:
    """Drop a test's rows about other methods, in place; False if the test is not about LoRA at all."""
    tables = [m.args[1] for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
    config_tables = [t for t in tables if any(mentions(row, peft.PeftConfig) for row in t)]
    for table in config_tables:
        ours = [row for row in table if mentions(row, DynLoraAsLora) and is_supported(row)]
        table[:] = [renamed(row) for row in ours]
    if config_tables:
        return all(config_tables)
    return "LoraConfig" in names_in(test.__code__)


def with_learning_rate(test: Callable[..., None], rates: dict[str, float]) -> Callable[..., None]:
    """``test`` with the SGD rate that its model needs."""
    sgd = torch.optim.SGD

    @functools.wraps(test)
    def run(self: Any, test_name: str, model_id: str, config_cls: type, config_kwargs: Any) -> None:
        def optimizer(params: Any, lr: float) -> torch.optim.SGD:
            return sgd(params, lr=rates.get(model_id, lr))

        with mock.patch.object(torch.optim, "SGD", optimizer):
            test(self, test_name, model_id, config_cls, config_kwargs)

    return run


def with_gates(check_requires_grad: Callable[..., None]) -> Callable[..., None]:
    """PEFT's check of the trainable parameters' names, expecting the gate of each expected A too."""

    @functools.wraps(check_requires_grad)
    def run(self: Any, model: Any, *expected: str) -> None:
        gates = [re.sub(r"(lora_A\.\w+)\.weight$", r"\1.c", name) for name in expected]
        gates = [re.sub(r"lora_embedding_A\.(\w+)$", r"lora_c.\1", name) for name in gates]
        check_requires_grad(self, model, *{*expected, *gates})

    return run


sys.modules.setdefault("diffusers", stand_in_for_diffusers())
with mock.patch.object(peft, "LoraConfig", DynLoraAsLora):
    from . import test_custom_models as stock

for _class in [c for c in vars(stock).values() if inspect.isclass(c)]:
    if _class.__module__ == stock.__name__ and _class.__name__.startswith("Test"):
        for _name in [n for n in vars(_class) if n.startswith("test_")]:
            if not keep_rows_of_lora(vars(_class)[_name]):
                delattr(_class, _name)
for _name, _rates in LEARNING_RATES.items():
    _test = getattr(stock.TestPeftCustomModel, _name)
    setattr(stock.TestPeftCustomModel, _name, with_learning_rate(_test, _rates))
stock.TestRequiresGrad.check_requires_grad = with_gates(stock.TestRequiresGrad.check_requires_grad)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Skip what SKIPPED names."""
    for item in items:
        reason = SKIPPED.get(item.name) or SKIPPED.get(item.originalname)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
