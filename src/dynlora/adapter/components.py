"""Where the gated layers of a model are, whatever wraps it: the view that all other rooms use."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.flat_shards import remember_flat_shards, unwrap_fsdp, without_wrappers
from dynlora.adapter.layers import factors, is_dropped, is_gated
from dynlora.adapter.sharding import is_sharded
from dynlora.adapter.zero import unwrap_engine

RANK_DIMS = (0, 1, 0)
"""Where A (rank, in, ...), B (out, rank, ...) and c (rank,) count components."""


@dataclass(frozen=True)
class GatedLayer:
    """One adapted module: a LoRA layer, its name in the base model, and the adapter's factors.

    Parameters are looked up at each access, because PEFT and compaction replace them.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def is_dropped(self) -> bool:
        """Whether the module fell to rank 0 and computes no adapter any more."""
        return is_dropped(self.layer, self.adapter)

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A (rank, in, ...), B (out, rank, ...) and c (rank,)."""
        return factors(self.layer, self.adapter)

    @property
    def gate(self) -> nn.Parameter:
        """The gate c, (rank,)."""
        return self.parameters[2]

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the factors (FSDP, ZeRO)."""
        return not self.is_dropped and is_sharded(self.gate)

    @property
    def scaling(self) -> float:
        """The constant s = lora_alpha / init_r."""
        scaling: float = self.layer.scaling[self.adapter]
        return scaling

    @property
    def ema(self) -> Tensor:
        """Smoothed importance, (rank,)."""
        ema: Tensor = self.layer.lora_ema[self.adapter]
        return ema

    @property
    def live(self) -> Tensor:
        """False where a component is pruned, (rank,), bool."""
        live: Tensor = self.layer.lora_live[self.adapter]
        return live

    @property
    def num_components(self) -> int:
        """Stored components, pruned ones that still have a place included."""
        return self.live.shape[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model that holds the adapted layers, below all wrappers.

    Module names in configs are relative to it. A module that only contains an adapted model, such as a
    SentenceTransformer or a LightningModule, counts as a wrapper.
    """
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(model, BaseTuner):
            model = model.model
        elif isinstance(model, nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif (inner := unwrap_engine(unwrap_fsdp(model))) is not model:
            model = inner
        elif (holder := _adapted_inside(model)) is not None:
            model = holder
        else:
            return model


def _adapted_inside(model: nn.Module) -> nn.Module | None:
    """The only adapted model inside one that knows of no adapter itself."""
    holders = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(vars(m).get("peft_config"), dict)
    ]
    if not holders or holders[0][1] is model:
        return None
    first, holder = holders[0]
    is_only = all(name.startswith(first + ".") for name, _ in holders[1:])
    return holder if is_only else None


def configs_of(model: nn.Module) -> dict[str, Any]:
    """PEFT configs by adapter name, {} for a model without adapters."""
    configs: dict[str, Any] = getattr(unwrapped(model), "peft_config", {})
    return configs


def find_config(model: nn.Module, adapter: str | None = None) -> tuple[str, DynLoraConfig]:
    """Name and config of the model's DynLora adapter.

    Args:
        model: a model with an injected adapter, wrapped or not.
        adapter: which one; may be left out if there is one, or one that is trainable.

    Raises:
        ValueError: there is no DynLora adapter, none of that name, or several to choose from.
    """
    configs = configs_of(model)
    ours = {n: c for n, c in configs.items() if isinstance(c, DynLoraConfig)}
    if not ours:
        found = ", ".join(f"{n} ({c.peft_type.value})" for n, c in configs.items()) or "none"
        raise ValueError(
            f"model={type(model).__name__} has no DynLora adapter (adapters found: {found}). Wrap it "
            "with get_peft_model(model, DynLoraConfig(...)). A finalized adapter is a plain LoRA: train it "
            "on without dynlora, or make it dynamic again with warm_start_."
        )
    if adapter is None and len(ours) > 1:
        trained = [n for n in ours if is_trainable(find_gated_layers(model, n))]
        adapter = trained[0] if len(trained) == 1 else None
    if adapter is None and len(ours) == 1:
        adapter = next(iter(ours))
    if adapter is None or adapter not in ours:
        raise ValueError(
            f"adapter={adapter!r} must name one of the model's DynLora adapters: {sorted(ours)}."
        )
    return adapter, ours[adapter]


def find_gated_layers(model: nn.Module, adapter: str) -> list[GatedLayer]:
    """The gated layers of ``adapter``, in module order, named as in the base model.

    Raises:
        ValueError: FSDP1 hides the parameters (``use_orig_params=False``).
    """
    remember_flat_shards(model)
    return [
        GatedLayer(without_wrappers(name), module, adapter)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, lora.LoraLayer)
        and (is_gated(module, adapter) or is_dropped(module, adapter))
    ]


def is_trainable(layers: list[GatedLayer]) -> bool:
    """Whether any gate receives gradients."""
    return any(not m.is_dropped and m.gate.requires_grad for m in layers)
