"""DynLoraModel: PEFT's LoraModel with gates, registered as the PEFT method DYNLORA."""

from typing import Any, NoReturn

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import register_peft_method
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dynlora._private import ConvNd
from dynlora.gated.config import DYNLORA, DynLoraConfig
from dynlora.gated.layer import attach_gate_
from dynlora.lora.components import unwrapped


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
            stored.check_against(unwrapped(model), config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

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
        if isinstance(base, nn.Embedding | nn.MultiheadAttention):
            raise ValueError(
                f"target_modules names {current_key!r}, a {type(base).__name__}, which has no gated form. "
                "Name other modules, or train a LoraConfig with DynLoraCallback(target_r=...)."
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        gate = attach_gate_(layer, adapter_name, lora_config)
        gate.requires_grad_(adapter_name in self.active_adapters and not lora_config.inference_mode)
        if lora_config.target_r == "auto" or lora_config.target_r < len(gate):
            gate.awaits_allocator = adapter_name  # type: ignore[attr-defined]  # ours

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
    modules = dict(model.named_modules())
    fused = [
        f"{name}.{parameter}"
        for name, module in modules.items()
        if not isinstance(module, ConvNd | BaseTunerLayer)
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and min(weight.shape) > 1  # a ViT's class token is (1, 1, hidden)
    ]
    named = config.target_modules or ()
    if isinstance(named, str):
        missing = [named] if named == "all-linear" else []
    else:
        missing = [k for k in sorted(named) if not any(f".{n}".endswith(f".{k}") for n in modules)]
    if fused and missing:
        raise ValueError(
            f"target_modules={missing} match no module of {type(model).__name__}, whose experts are "
            f"fused into tensors such as {fused[0]!r}: no LoRA layer there could hold gates. Train "
            "a LoraConfig with DynLoraCallback(target_r=...), which adapts experts too, or list the names "
            "of other modules, such as those of attention."
        )


def _refuse_unattended_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """A DynLoraConfig asks for pruning: training its gates without an allocator is an error."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        adapter = getattr(parameter, "awaits_allocator", None)
        if adapter is not None and parameter.grad is not None:
            raise RuntimeError(
                f"DynLora adapter {adapter!r} is being trained without a RankAllocator, so nothing "
                "would ever be pruned. Add callbacks=[DynLoraCallback()] to your Trainer, or build "
                "RankAllocator(model, optimizer, total_steps=...) before the first optimizer.step(). "
                "To train gates without pruning on purpose, set target_r=init_r."
            )


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
        register_optimizer_step_pre_hook(_refuse_unattended_step)


register()
