"""The rank-one components of stock LoRA layers: where they lie, and what wraps their model.

ΔW = s · Σᵢ bᵢ aᵢᵀ: component i of a module is row i of ``lora_A`` and column i of ``lora_B``. Two of
PEFT's layers hold several such pairs under one rank. MultiheadAttention adapts two projections. A
``target_parameters`` layer of E fused experts keeps A as (E·r, in), expert by expert, and B as
(out, r·E), slot by slot. There a component is one slot of all of the layer's pairs: PEFT stores one
rank for them, so only whole slots can be removed from what is saved.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dynlora._private import uncompiled, without_active_adapter
from dynlora.lora.sharding import full_shape, is_sharded, refuse_fsdp1, unwrap_engine

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile, activation checkpointing


@dataclass(frozen=True)
class Factor:
    """One trainable tensor of a layer, with the dimension along which components are counted.

    The parameter is looked up at each access, because PEFT and users replace it.

    Attributes:
        layer: the LoRA layer.
        container: its attribute that holds the tensors of all adapters, such as ``lora_A``.
        adapter: name of the adapter.
        attribute: of the entry, such as ``weight``; "" where the entry is the parameter.
        dim: the dimension that counts components.
        copies: vectors of one component along ``dim``, more than 1 for fused experts.
        is_grouped: whether the vectors of one copy stand together (A of experts: row e·r + i), rather
            than those of one component (B: column i·E + e).
    """

    layer: Any
    container: str
    adapter: str
    attribute: str
    dim: int
    copies: int = 1
    is_grouped: bool = False

    @property
    def name(self) -> str:
        """Of the parameter, in the layer."""
        return ".".join(filter(None, (self.container, self.adapter, self.attribute)))

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        entry = getattr(self.layer, self.container)[self.adapter]
        return getattr(entry, self.attribute) if self.attribute else entry

    def positions(self, keep: Tensor) -> Tensor:
        """Indices along ``dim`` of the components ``keep``, (kept,) -> (kept · copies,)."""
        if self.copies == 1:
            return keep
        copies = torch.arange(self.copies, device=keep.device)
        if self.is_grouped:
            rank = full_shape(self.parameter)[self.dim] // self.copies
            return (copies[:, None] * rank + keep).flatten()
        return (keep[:, None] * self.copies + copies).flatten()

    def by_component(self, values: Tensor) -> Tensor:
        """One value for each component, repeated along ``dim``: (rank,) -> (rank · copies,)."""
        if self.copies == 1:
            return values
        return (
            values.repeat(self.copies) if self.is_grouped else values.repeat_interleave(self.copies)
        )

    def vectors(self, tensor: Tensor) -> Tensor:
        """The components' vectors in a tensor of the parameter's shape, (copies, rank, length)."""
        rows = tensor.movedim(self.dim, 0).flatten(1)
        if self.is_grouped:
            return rows.view(self.copies, -1, rows.shape[1])
        return rows.view(-1, self.copies, rows.shape[1]).transpose(0, 1)

    @torch.no_grad()
    def cut_(self, keep: Tensor) -> None:
        """Leave only the components ``keep``, (kept,), in the parameter and in its gradient."""
        parameter = self.parameter
        places = self.positions(keep.to(parameter.device))
        gradient = parameter.grad
        replace_data_(parameter, parameter.detach().index_select(self.dim, places))
        if gradient is not None:
            parameter.grad = gradient.index_select(self.dim, places)

    @torch.no_grad()
    def resize_(self, rank: int) -> None:
        """Give the parameter another rank; its values are then undefined until they are loaded."""
        parameter = self.parameter
        shape = list(parameter.shape)
        shape[self.dim] = rank * self.copies
        replace_data_(parameter, parameter.data.new_zeros(shape))


class LoraComponents:
    """The components of one adapted module, with their scores.

    Args:
        path: of the module in the base model, wrappers left out.
        layer: PEFT's LoRA layer there.
        adapter: name of the adapter.

    Attributes:
        name: the path, or that of the parameter for fused experts, as PEFT's patterns see it.
        ema: smoothed importance, (rank,), fp32.
        live: False where a component is pruned, (rank,), bool.
        must_stay: whether something else of the adapter is saved only while the module has components.
        is_gated: whether the layer has a number in front of each component while it has rank.
    """

    must_stay = False
    is_gated = False

    def __init__(self, path: str, layer: Any, adapter: str) -> None:
        self.path = path
        self.name = _pattern_name(path, layer)
        self.layer = layer
        self.adapter = adapter
        self.forget_scores()

    def forget_scores(self) -> None:
        """Set scores to 0 and all components alive, at the layer's present rank."""
        device = self.probes[0].parameter.device if not self.is_dropped else "cpu"
        self.ema: Tensor = torch.zeros(self.rank, device=device)
        self.live: Tensor = torch.ones(self.rank, dtype=torch.bool, device=device)

    def follow_device_(self) -> None:
        """Put scores where the factors are: the model may have moved since they were made."""
        device = self.probes[0].parameter.device
        self.ema, self.live = self.ema.to(device), self.live.to(device)

    @cached_property
    def layers(self) -> tuple[Any, ...]:
        """The LoRA layers that share the module's rank, the module's own first."""
        if isinstance(self.layer, lora.MultiheadAttention):
            return self.layer, self.layer.base_layer.out_proj
        return (self.layer,)

    @property
    def pairs(self) -> list[tuple[Factor, Factor]]:
        """A and B of each of ``layers``."""
        return [pair_of(layer, self.adapter) for layer in self.layers]

    @property
    def factors(self) -> list[Factor]:
        """All trainable tensors that count components, in a fixed order."""
        return [factor for pair in self.pairs for factor in pair]

    @property
    def probes(self) -> list[Factor]:
        """What the sensitivity is read from, with its gradient: B, or A where only A is trained (MiCA)."""
        return [_trained(a, b) for a, b in self.pairs]

    @property
    def switches(self) -> list[Factor]:
        """The tensors that are 0 where a component is pruned: those that LoRA starts at 0."""
        is_embedding = isinstance(self.layer, lora.Embedding)
        return [a if is_embedding else _trained(a, b) for a, b in self.pairs]

    @property
    def gate(self) -> Tensor | None:
        """One number in front of each component, (rank,); None, there is none in a stock layer."""
        return None

    @property
    def is_dropped(self) -> bool:
        """Whether the module fell to rank 0 and computes no adapter any more."""
        return self.adapter not in {*self.layer.lora_A, *self.layer.lora_embedding_A}

    @property
    def can_drop(self) -> bool:
        """Whether the module may lose its adapter; otherwise it keeps one component of zeros.

        A bias in B stays without components. The parameters of one module of experts are wrapped one
        around the other, and PEFT could not find the inner one again without the outer.
        """
        return not (
            self.must_stay
            or isinstance(self.layer, lora.ParamWrapper)
            or any(layer.lora_bias.get(self.adapter) for layer in self.layers)
        )

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the factors (FSDP, ZeRO)."""
        return not self.is_dropped and is_sharded(self.probes[0].parameter)

    @property
    def is_trainable(self) -> bool:
        """Whether the components receive gradients."""
        return not self.is_dropped and any(p.parameter.requires_grad for p in self.probes)

    @property
    def rank(self) -> int:
        """Stored components, pruned ones that still have a place included."""
        return 0 if self.is_dropped else int(self.layer.r[self.adapter])

    @property
    def scaling(self) -> float | None:
        """The constant s in front of the update; None for a dropped module."""
        return None if self.is_dropped else float(self.layer.scaling[self.adapter])

    @property
    def component_size(self) -> int:
        """Parameters of one component in A and B, 0 for a dropped module."""
        return sum(full_shape(f.parameter).numel() for f in self.sized) // max(1, self.rank)

    @property
    def sized(self) -> list[Factor]:
        """The factors that what is saved will hold."""
        return [] if self.is_dropped else self.factors

    def note_rank_(self, rank: int) -> None:
        """Let PEFT's own bookkeeping follow a change of rank; ``scaling`` stays what it was."""
        for layer in self.layers:
            note_layer_rank_(layer, self.adapter, rank)

    def resize_(self, rank: int) -> None:
        """Give the factors a rank of at least 1; their values are undefined until they are loaded."""
        if rank != self.rank:
            for factor in self.factors:
                factor.resize_(rank)
            self.note_rank_(rank)
        self.forget_scores()

    def restore_(self, rank: int, alpha: float, config: LoraConfig) -> None:
        """Give a dropped module its adapter back by PEFT's means; values are undefined until loaded."""
        self.layer.update_layer(self.adapter, rank, lora_alpha=alpha, config=config)

    def kept(self) -> Tensor:
        """Indices of the components that keep a place: all live ones, at least one if it must."""
        keep = self.live.nonzero().flatten()
        return keep if len(keep) or self.can_drop else keep.new_zeros(1)

    def keep_(self, keep: Tensor) -> list[nn.Parameter]:
        """Leave only the components ``keep``, (kept,), in place; returns parameters that left the model."""
        if len(keep) == 0:
            return self.drop_()
        for factor in self.factors:
            factor.cut_(keep)
        self.note_rank_(len(keep))
        self.ema, self.live = self.ema[keep], self.live[keep]
        return []

    def drop_(self) -> list[nn.Parameter]:
        """Stop computing the adapter in this module; the parameters that no one needs any more.

        PEFT's ``delete_adapter`` would activate another adapter in this one module only, so what is
        active stays what it was.
        """
        gone = [factor.parameter for factor in self.factors]
        for layer in self.layers:
            with without_active_adapter(layer):
                layer.delete_adapter(self.adapter)
        self.ema, self.live = self.ema[:0], self.live[:0]
        return gone


@torch.no_grad()
def replace_data_(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape, and no gradient; it stays the same object.

    Lists kept for clipping, averages and optimizers go on holding what is trained. Assigning data of
    another dtype first makes autograd forget the node that accumulates into the parameter: while an
    earlier graph is alive, and a loop's ``loss`` keeps it so, that node would refuse gradients of the new
    shape.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def note_layer_rank_(layer: Any, adapter: str, rank: int) -> None:
    """Let one layer's bookkeeping follow a change of rank; ``scaling`` stays what it was."""
    divisor = rank**0.5 if layer.use_rslora.get(adapter) else rank
    layer.r[adapter] = rank
    layer.lora_alpha[adapter] = layer.scaling[adapter] * divisor
    if adapter not in layer.lora_A:
        return
    stored = rank * getattr(layer, "num_experts", 1)
    for part, side in ((layer.lora_A[adapter], "out"), (layer.lora_B[adapter], "in")):
        for size in (f"{side}_features", f"{side}_channels"):
            if hasattr(part, size):
                setattr(part, size, stored)


def _trained(a: Factor, b: Factor) -> Factor:
    return a if a.parameter.requires_grad and not b.parameter.requires_grad else b


def pair_of(layer: Any, adapter: str) -> tuple[Factor, Factor]:
    """A and B of one LoRA layer."""
    if isinstance(layer, lora.Embedding):
        return (
            Factor(layer, "lora_embedding_A", adapter, "", 0),
            Factor(layer, "lora_embedding_B", adapter, "", 1),
        )
    copies = layer.num_experts if isinstance(layer, lora.ParamWrapper) else 1
    return (
        Factor(layer, "lora_A", adapter, "weight", 0, copies, is_grouped=True),
        Factor(layer, "lora_B", adapter, "weight", 1, copies),
    )


def find_components(model: nn.Module, adapter: str) -> list[LoraComponents]:
    """The adapted modules of ``adapter``, in module order, named as in the base model.

    A layer may bring a class of components of its own by the adapter's name, in ``components_of``.

    Raises:
        ValueError: the model is inside FSDP1.
    """
    refuse_fsdp1(model)
    found: list[LoraComponents] = []
    halves: set[int] = set()
    config = configs_of(model).get(adapter)
    has_biases = getattr(config, "bias", "none") != "none"  # saved only where there is a LoRA
    for name, module in unwrapped(model).named_modules():
        if not isinstance(module, lora.LoraLayer) or id(module) in halves:
            continue
        kind = getattr(module, "components_of", {}).get(adapter)
        if kind is None and isinstance(module, lora.MultiheadAttention):
            halves.add(id(module.base_layer.out_proj))
        if kind or adapter in {*module.lora_A, *module.lora_embedding_A}:
            found.append((kind or LoraComponents)(without_wrappers(name), module, adapter))
            found[-1].must_stay = has_biases
    return found


def _pattern_name(path: str, layer: Any) -> str:
    if not isinstance(layer, lora.ParamWrapper):
        return path
    # the parameters of one module are wrapped around each other
    return f"{path.partition('.base_layer')[0]}.{layer.parameter_name}"


def without_wrappers(name: str) -> str:
    """A module name as it was before anything was wrapped."""
    for wrapper in _WRAPPERS:
        name = (name + ".").replace(wrapper, "").removesuffix(".")
    return name


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
        elif (inner := unwrap_engine(uncompiled(model))) is not model:
            model = inner
        elif (holder := _adapted_inside(model)) is not None:
            model = holder
        else:
            return model


def embeddings_of(model: Any) -> list[Any]:
    """Input and output embeddings of a model of transformers, None for what it has not."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name, lambda: None)())
        except NotImplementedError:  # of a model with two vocabularies, or none
            found.append(None)
    return found


def _adapted_inside(model: nn.Module) -> nn.Module | None:
    """The only adapted model inside one that knows of no adapter itself."""
    holders: list[tuple[str, nn.Module]] = []  # the outermost ones
    for name, module in model.named_modules():
        is_inside = any(name.startswith(outer + ".") or not outer for outer, _ in holders)
        if isinstance(vars(module).get("peft_config"), dict) and not is_inside:
            holders.append((name, module))
    if not holders or holders[0][1] is model:
        return None
    if len(holders) > 1:
        raise ValueError(
            f"model={type(model).__name__} holds {len(holders)} adapted models: "
            f"{', '.join(repr(name) for name, _ in holders)}. Build one RankAllocator for each of them, "
            f"on the inner model: RankAllocator(model.{holders[0][0]}, optimizer, ...)."
        )
    return holders[0][1]


def configs_of(model: nn.Module) -> dict[str, Any]:
    """PEFT configs by adapter name, {} for a model without adapters."""
    configs: dict[str, Any] = getattr(unwrapped(model), "peft_config", {})
    return configs


def is_lora(config: object) -> bool:
    """Whether a config is of a LoRA, stock or gated; AdaLoRA's also derives from LoraConfig."""
    return isinstance(config, LoraConfig) and config.peft_type != PeftType.ADALORA


def find_adapter(model: nn.Module, adapter: str | None = None) -> tuple[str, LoraConfig]:
    """Name and config of the model's LoRA adapter: the only one, or the only one that is trainable.

    Raises:
        ValueError: there is no LoRA adapter, none of that name, or several to choose from.
    """
    configs = configs_of(model)
    ours = {n: c for n, c in configs.items() if is_lora(c)}
    if not ours:
        found = ", ".join(f"{n} ({c.peft_type.value})" for n, c in configs.items()) or "none"
        raise ValueError(
            f"model={type(model).__name__} has no LoRA adapter (adapters found: {found}). Wrap it "
            "with get_peft_model(model, LoraConfig(...)) first."
        )
    if adapter is None and len(ours) > 1:
        trained = [n for n in ours if any(m.is_trainable for m in find_components(model, n))]
        adapter = trained[0] if len(trained) == 1 else None
    if adapter is None and len(ours) == 1:
        adapter = next(iter(ours))
    if adapter is None or adapter not in ours:
        raise ValueError(
            f"adapter={adapter!r} must name one of the model's LoRA adapters: {sorted(ours)}."
        )
    return adapter, ours[adapter]
