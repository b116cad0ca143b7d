"""Gates inside PEFT's LoRA layers: y = W x + s · B (c ⊙ A x).

The gate c lives inside ``lora_A[adapter]``: the class of that module is swapped for one that
multiplies its output by c, and the class of the LoRA layer for one whose ``get_delta_weight`` sees
c. So every backend that computes ``lora_B(lora_A(dropout(x))) * scaling`` works unmodified.
Embeddings keep their factors as bare parameters; they get a ``lora_c`` entry and a LoraVariant.
A plain Linear has a faster path for the same function, in ``fused.py``.

Beside the weights, each layer holds two buffers: ``lora_ema`` (smoothed importance, Eq. 8) and
``lora_live`` (False = pruned). They are saved and loaded with the adapter, so a checkpoint is whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from dynlora._private import BufferDict
from dynlora.lora.components import Factor, LoraComponents, note_layer_rank_, replace_data_

BUFFERS = ("lora_ema", "lora_live")
_gated: dict[type, type] = {}
_dynlora: dict[type, type] = {}


def gated_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a Linear or ConvNd class whose outputs, one per component, are multiplied by c."""
    if cls not in _gated:
        is_linear = issubclass(cls, nn.Linear)

        def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            z: Tensor = cls.forward(self, x, *args, **kwargs)
            c = self.c.to(z.dtype)
            return z * (c if is_linear else c.view(1, -1, *[1] * (z.ndim - 2)))

        _gated[cls] = _named_class("Gated" + cls.__name__, cls, {"forward": forward})
    return _gated[cls]


def dynlora_class(cls: type[lora.LoraLayer]) -> type[lora.LoraLayer]:
    """Subclass of a LoRA layer class that merges, saves and loads the gates of its adapters."""
    if cls not in _dynlora:

        def get_delta_weight(self: Any, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
            if isinstance(self.lora_variant.get(adapter), EmbeddingGate):
                return embedding_delta(self, adapter)
            if is_dropped(self, adapter):  # torchao's merge asks for it all the same
                shape = (self.out_features, self.in_features)
                is_transposed = getattr(self, "fan_in_fan_out", False)
                return self.lora_ema[adapter].new_zeros(shape[::-1] if is_transposed else shape)
            if not is_gated(self, adapter):
                return cls.get_delta_weight(self, adapter, *args, **kwargs)
            with _gate_in_weight(self.lora_A[adapter]):
                return cls.get_delta_weight(self, adapter, *args, **kwargs)

        def _load_from_state_dict(
            self: Any, state: dict[str, Tensor], prefix: str, *rest: Any
        ) -> None:
            for adapter in list(self.lora_ema):
                _restore_empty_(state, prefix, adapter)
                saved = state.get(f"{prefix}lora_ema.{adapter}")
                if saved is not None:
                    resize_(self, adapter, saved.shape[0])
            cls._load_from_state_dict(self, state, prefix, *rest)

        def other_param_names(self: Any) -> tuple[str, ...]:
            """What ``delete_adapter`` empties beside the weights; some stock layers add to it."""
            stock = self.__dict__.get("other_param_names", cls.other_param_names)
            own = (*BUFFERS, "dropped_factors")
            return (*stock, *(name for name in own if hasattr(self, name)))

        def components_class(self: Any, adapter: str) -> type[LoraComponents]:
            is_ours = is_gated(self, adapter) or is_dropped(self, adapter)
            return GatedComponents if is_ours else LoraComponents

        body = {
            "get_delta_weight": get_delta_weight,
            "_load_from_state_dict": _load_from_state_dict,
            "other_param_names": property(other_param_names),
            "components_class": components_class,
            "stock_class": cls,
        }
        name = "DynLora" + cls.__module__.rpartition(".")[2].title() + cls.__name__
        _dynlora[cls] = _named_class(name, cls, body)
    return _dynlora[cls]


def _restore_empty_(state: dict[str, Tensor], prefix: str, adapter: str) -> None:
    """Put back the empty buffers of a dropped module that were lost when the state was saved.

    accelerate's ``save_state`` takes all empty tensors for one shared tensor and keeps one of them.
    """
    ema, live = f"{prefix}lora_ema.{adapter}", f"{prefix}lora_live.{adapter}"
    is_whole_model = any(key.startswith(f"{prefix}base_layer.") for key in state)
    names = (f"{prefix}lora_A.{adapter}.weight", f"{prefix}lora_embedding_A.{adapter}")
    if is_whole_model and not any(name in state for name in names):
        state.setdefault(ema, torch.zeros(0))
        state.setdefault(live, torch.zeros(0, dtype=torch.bool))


def _named_class(name: str, base: type, body: dict[str, Any]) -> Any:
    """A generated class that pickle finds by its name in this file."""
    globals()[name] = type(name, (base,), {**body, "__module__": __name__})
    return globals()[name]


@contextmanager
def _gate_in_weight(lora_a: Any) -> Iterator[None]:
    """Let ``lora_a.weight`` be c ⊙ weight, with gradient, for as long as the context lasts."""
    parameters = dict(lora_a._parameters)  # their order is the order of the optimizer's state
    weight = lora_a._parameters.pop("weight")
    gate = lora_a.c.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
    lora_a.weight = weight * gate
    try:
        yield
    finally:
        del lora_a.weight
        lora_a._parameters.clear()
        lora_a._parameters.update(parameters)


def is_gated(layer: lora.LoraLayer, adapter: str) -> bool:
    """Whether ``layer`` holds factors with gates for ``adapter`` (not so once it fell to rank 0)."""
    if adapter in layer.lora_A:
        return hasattr(layer.lora_A[adapter], "c")
    return isinstance(layer.lora_variant.get(adapter), EmbeddingGate)


def factors(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """A (rank, in, ...), B (out, rank, ...) and c (rank,) of a gated adapter in one layer."""
    if isinstance(layer, lora.Embedding):
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return a, b, layer.lora_c[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.lora_A[adapter].c


def embedding_delta(layer: Any, adapter: str) -> Tensor:
    """ΔW of a gated embedding, (vocabulary, dim)."""
    a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]  # (r, vocab), (dim, r)
    delta: Tensor = ((b * layer.lora_c[adapter].to(b.dtype)) @ a).T * layer.scaling[adapter]
    return delta


class EmbeddingGate(lora.LoraVariant):  # type: ignore[misc]  # peft is untyped
    """Forward and merge of a gated embedding: e(x) = W[x] + s · (A[:, x]ᵀ ⊙ c) Bᵀ."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_kwargs: Any) -> None:
        """Nothing to do: ``attach_gate_`` follows whenever PEFT builds the factors."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight, as a new tensor."""
        return orig_weight + embedding_delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place."""
        orig_weight.data.add_(embedding_delta(module, active_adapter))

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the update, as a new tensor."""
        return orig_weight - embedding_delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **_kwargs: Any
    ) -> Tensor:
        """Embed ``x`` (...,) and add the update to ``result`` (..., dim)."""
        a = module.lora_embedding_A[active_adapter].T
        b = module.lora_embedding_B[active_adapter].T
        z = module._embed(x, a)
        z = z * module.lora_c[active_adapter].to(z.dtype)
        update = z @ b * module.scaling[active_adapter]
        scale = module._get_embed_scale()  # Gemma and others scale inside their embedding
        return result + (update if scale is None else update * scale.to(update.dtype))


def attach_gate_(
    layer: Any,
    adapter: str,
    *,
    identity: bool,
    init_std: float | None,
    init: str = "kaiming",
) -> nn.Parameter:
    """Give ``adapter`` of a stock LoRA layer its gate and buffers, and draw A and B anew, in place.

    Args:
        layer: a LoRA layer that holds ``adapter``.
        adapter: name of the adapter.
        identity: True starts at ΔW = 0 (c = 0, or B = 0); False keeps PEFT's random A and B and c = 1.
        init_std: None for a Kaiming initialisation, else the standard deviation.
        init: where that is None: ``kaiming`` or ``lora``, as DynLoraConfig says.

    Returns:
        The gate, (rank,).
    """
    if isinstance(layer, lora.Embedding):
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        if not hasattr(layer, "lora_c"):
            layer.lora_c = nn.ParameterDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_c")
        gate = nn.Parameter(torch.zeros(a.shape[0], dtype=a.dtype, device=a.device))
        layer.lora_c[adapter] = gate
        layer.lora_variant[adapter] = EmbeddingGate()
        gate = layer.lora_c[adapter]
    else:
        lora_a = layer.lora_A[adapter]
        a, b = lora_a.weight, layer.lora_B[adapter].weight
        lora_a.__class__ = gated_class(type(lora_a))
        gate = nn.Parameter(torch.zeros(a.shape[0], dtype=a.dtype, device=a.device))
        lora_a.c = gate
    if not hasattr(type(layer), "stock_class"):
        layer.__class__ = dynlora_class(type(layer))
    if not hasattr(layer, "lora_ema"):
        layer.lora_ema = BufferDict({}, persistent=True)
        layer.lora_live = BufferDict({}, persistent=True)
    layer.lora_ema[adapter] = torch.zeros(a.shape[0], device=a.device)
    layer.lora_live[adapter] = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
    layer.__dict__.get("dropped_factors", {}).pop(adapter, None)  # of a namesake replaced just now
    if a.device.type != "meta":
        _draw_(a, b, gate, identity=identity, init_std=init_std, init=init)
    return gate


@torch.no_grad()
def _draw_(
    a: Tensor, b: Tensor, gate: Tensor, *, identity: bool, init_std: float | None, init: str
) -> None:
    """Initial values: PEFT's, Kaiming uniform with the official code's a = 0, or N(0, init_std²)."""
    if not identity or (init_std is None and init == "lora"):
        gate.fill_(1.0)  # A and B stay as PEFT has drawn them
        return
    for factor in (a, b):
        if init_std is None:
            nn.init.kaiming_uniform_(factor, a=0)
        else:
            nn.init.normal_(factor, std=init_std)


def drop_(layer: Any, adapter: str) -> None:
    """Let a layer stop computing an adapter that fell to rank 0; its empty factors are put aside."""
    kept = {}
    for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_c"):
        entries = getattr(layer, name, {})
        if adapter in entries:
            kept[name] = entries[adapter]
            del entries[adapter]
    layer.__dict__.setdefault("dropped_factors", {})[adapter] = kept
    device = layer.lora_ema[adapter].device
    layer.lora_ema[adapter] = torch.zeros(0, device=device)
    layer.lora_live[adapter] = torch.zeros(0, dtype=torch.bool, device=device)


def is_dropped(layer: Any, adapter: str) -> bool:
    """Whether ``adapter`` fell to rank 0 in this layer and is no longer computed."""
    return adapter in layer.__dict__.get("dropped_factors", {})


def dropped_parameters(layer: Any, adapter: str) -> list[nn.Parameter]:
    """The empty parameters that ``drop_`` put aside, which no optimizer needs any more."""
    kept = layer.__dict__.get("dropped_factors", {}).get(adapter, {})
    return [
        parameter
        for factor in kept.values()
        for parameter in (factor.parameters() if isinstance(factor, nn.Module) else (factor,))
    ]


def resize_(layer: Any, adapter: str, rank: int) -> None:
    """Give the factors of ``adapter`` the rank of a checkpoint about to be loaded, in place.

    Parameters keep their identity, so an optimizer that holds them stays right; their values are
    undefined until the checkpoint is loaded.
    """
    if is_dropped(layer, adapter):
        if rank == 0:
            return
        for name, factor in layer.__dict__["dropped_factors"].pop(adapter).items():
            getattr(layer, name)[adapter] = factor
    a, b, c = factors(layer, adapter)
    if c.shape[0] != rank:
        replace_data_(a, a.data.new_zeros(rank, *a.shape[1:]))
        replace_data_(b, b.data.new_zeros(b.shape[0], rank, *b.shape[2:]))
        replace_data_(c, c.data.new_zeros(rank))
    if layer.lora_ema[adapter].shape[0] != rank:
        layer.lora_ema[adapter] = layer.lora_ema[adapter].new_zeros(rank)
        layer.lora_live[adapter] = layer.lora_live[adapter].new_ones(rank)
    if rank == 0 and can_drop(layer):
        drop_(layer, adapter)
    else:
        note_layer_rank_(layer, adapter, rank)


def can_drop(layer: Any) -> bool:
    """Whether a layer can do without its adapter at rank 0.

    MultiheadAttention adapts two projections at once and expects both to hold the adapter.
    """
    return not getattr(layer, "is_half_of_attention", False)


class GatedComponents(LoraComponents):
    """The components of one gated layer: A, B and the gate c; scores and masks are its buffers."""

    is_gated = True

    @property
    def layers(self) -> tuple[Any, ...]:
        """The layer."""
        return (self.layer,)

    @property
    def gate_factor(self) -> Factor:
        """Where c is."""
        if isinstance(self.layer, lora.Embedding):
            return Factor(self.layer, "lora_c", self.adapter, "", 0)
        return Factor(self.layer, "lora_A", self.adapter, "c", 0)

    @property
    def gate(self) -> nn.Parameter:
        """The gate c, (rank,)."""
        return self.gate_factor.parameter

    @property
    def factors(self) -> list[Factor]:
        """A, B and c."""
        return [*self.pairs[0], self.gate_factor]

    @property
    def sized(self) -> list[Factor]:
        """A and B: c is folded into B in the end."""
        return [] if self.is_dropped else list(self.pairs[0])

    @property
    def probes(self) -> list[Factor]:
        """The gate, whose product with its gradient is the sensitivity."""
        return [self.gate_factor]

    @property
    def switches(self) -> list[Factor]:
        """The gate, which is 0 where a component is pruned."""
        return [self.gate_factor]

    @property
    def ema(self) -> Tensor:
        """Smoothed importance, (rank,)."""
        ema: Tensor = self.layer.lora_ema[self.adapter]
        return ema

    @ema.setter
    def ema(self, value: Tensor) -> None:
        self.layer.lora_ema[self.adapter] = value

    @property
    def live(self) -> Tensor:
        """False where a component is pruned, (rank,), bool."""
        live: Tensor = self.layer.lora_live[self.adapter]
        return live

    @live.setter
    def live(self, value: Tensor) -> None:
        self.layer.lora_live[self.adapter] = value

    def forget_scores(self) -> None:
        """Nothing: the layer keeps its scores, also between two looks at it."""

    @property
    def is_dropped(self) -> bool:
        """Whether the module fell to rank 0 and computes no adapter any more."""
        return is_dropped(self.layer, self.adapter)

    @property
    def can_drop(self) -> bool:
        """Whether the layer can do without its adapter."""
        return can_drop(self.layer) and not self.must_stay

    @property
    def rank(self) -> int:
        """Stored components, pruned ones that still have a place included."""
        return int(self.live.shape[0])

    def drop_(self) -> list[nn.Parameter]:
        """Stop computing the adapter; its empty factors are put aside for a later checkpoint."""
        nothing = torch.zeros(0, dtype=torch.int64, device=self.live.device)
        for factor in self.factors:
            factor.cut_(nothing)
        drop_(self.layer, self.adapter)
        return dropped_parameters(self.layer, self.adapter)

    @classmethod
    def is_here(cls, layer: Any, adapter: str) -> bool:
        """Whether the run of ``adapter`` concerns this layer, if only by its rank of 0."""
        return is_gated(layer, adapter) or is_dropped(layer, adapter)


for _stock in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
    gated_class(_stock)  # named at import, so that torch.load finds them in a new process
for _stock_layer in (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d):
    dynlora_class(_stock_layer)
dynlora_class(lora.MultiheadAttention)
