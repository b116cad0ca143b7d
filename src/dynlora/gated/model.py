"""DynLoraModel: PEFT's LoraModel with gates, registered as the PEFT method DYNLORA."""

import re
from typing import Any, NoReturn

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from dynlora._private import ConvNd
from dynlora.gated.adapter_file import check_tensors
from dynlora.gated.base_match import check_against_base, check_others, check_same_modules
from dynlora.gated.config import DYNLORA, DynLoraConfig
from dynlora.gated.configs import with_one_component
from dynlora.gated.guard import expect_allocator
from dynlora.gated.layer import attach_gate_, resize_
from dynlora.lora.components import find_components, unwrapped


class DynLoraModel(LoraModel):  # type: ignore[misc]  # peft is untyped
    """Injects LoRA layers as LoraModel does, then gives each of them its gate."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject as PEFT does; an adapter from a folder is compared with the model before.

        Raises:
            ValueError: ``target_modules`` names experts that are fused into one tensor, which PEFT would
                silently leave out, or the stored adapter does not fit the model.
        """
        config = self.peft_config[adapter_name]
        _refuse_fused_experts(model, config)
        stored = config.__dict__.pop("stored", None)
        if stored is not None:
            check_against_base(unwrapped(model), config, stored)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: DynLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        # a caller of set_peft_model_state_dict may bring trained biases that the config does not name
        stored = check_tensors({k: v for k, v in state_dict.items() if not k.endswith(".bias")})
        check_others(unwrapped(model), config, stored)
        modules = find_components(model, adapter_name)
        check_same_modules([m.name for m in modules], stored)
        for (
            module
        ) in modules:  # PEFT finds the keys of a file through the layers that the model has
            shapes = stored.shapes.get(module.name)
            if module.is_dropped and shapes is not None:
                resize_(module.layer, adapter_name, shapes[0][0])
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return remapped

    def _create_and_replace(
        self,
        lora_config: DynLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if getattr(base, "groups", 1) > 1:
            raise ValueError(
                f"target_modules matches {target_name!r}, a convolution with groups={base.groups}: its "
                "components do not reach all outputs, so their norms cannot be compared. Name it in "
                "exclude_modules."
            )
        ranks = lora_config.rank_pattern
        is_empty = ranks.get(get_pattern_key(ranks, current_key)) == 0
        built = with_one_component(lora_config, current_key) if is_empty else lora_config
        super()._create_and_replace(
            built, adapter_name, target, target_name, parent, current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        trained = adapter_name in self.active_adapters and not lora_config.inference_mode
        identity = lora_config.init_lora_weights is not False
        inner = [m for m in layer.modules() if isinstance(m, lora.LoraLayer)]
        if not all(adapter_name in {*m.lora_A, *m.lora_embedding_A} for m in inner):
            raise ValueError(
                f"target_modules matches {target_name!r}, whose custom LoRA layer "
                f"{type(layer).__name__} keeps no lora_A: there are no components to gate. Name it in "
                "exclude_modules."
            )
        for lora_layer in inner:  # MultiheadAttention hides a second one in its out_proj
            lora_layer.is_half_of_attention = isinstance(layer, lora.MultiheadAttention)
            gate = attach_gate_(
                lora_layer,
                adapter_name,
                identity=identity,
                init_std=lora_config.init_std,
                init=lora_config.init,
            )
            gate.requires_grad_(trained)
            if is_empty:
                resize_(lora_layer, adapter_name, 0)
            if lora_config.target_r < lora_layer.r[adapter_name]:
                expect_allocator(lora_layer, adapter_name)

    def add_weighted_adapter(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused: PEFT's combinations read A and B and would silently ignore the gates.

        Raises:
            ValueError: always; finalized adapters are plain LoRA and can be combined.
        """
        raise ValueError(
            "add_weighted_adapter cannot combine DynLora adapters: it would ignore their gates. Call "
            "dynlora.finalize_(model, adapter) on each adapter first, then combine the plain LoRAs."
        )


def _refuse_fused_experts(model: nn.Module, config: DynLoraConfig) -> None:
    """PEFT's LoRA turns such names into ``target_parameters``; for other methods it leaves them out."""
    named = config.target_modules
    if not named:
        return
    modules = dict(model.named_modules())
    fused = [
        f"{name}.{parameter}"
        for name, module in modules.items()
        if not isinstance(module, ConvNd | BaseTunerLayer)
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and min(weight.shape) > 1  # a ViT's class token is (1, 1, hidden)
    ]
    if not fused:
        return
    if isinstance(named, str):
        missing = [named] if named == "all-linear" or _names_experts(named, fused) else []
    else:
        missing = [k for k in sorted(named) if not any(f".{n}".endswith(f".{k}") for n in modules)]
    if missing:
        raise ValueError(
            f"target_modules={missing} match no module of {type(model).__name__}, whose experts are "
            f"fused into tensors such as {fused[0]!r}: no LoRA layer there could hold gates. Train "
            "a LoraConfig with DynLoraCallback(target_r=...), which adapts experts too, or list the names "
            "of other modules, such as those of attention."
        )


def _names_experts(pattern: str, fused: list[str]) -> bool:
    """Whether a regular expression means experts, by their present names or by those before fusing."""
    modules = {name.rpartition(".")[0] for name in fused}
    parts = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    former = [
        f"{module}.{place}{part}" for module in modules for part in parts for place in ("", "0.")
    ]
    return any(re.fullmatch(pattern, name) for name in [*fused, *former])


def register() -> None:
    """Make ``DYNLORA`` known to PEFT; importing dynlora does it."""
    if DYNLORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name="dynlora",
            config_cls=DynLoraConfig,
            model_cls=DynLoraModel,
            prefix="lora_",
            is_mixed_compatible=False,
        )


register()
