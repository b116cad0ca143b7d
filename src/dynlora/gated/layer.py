"""Gates inside PEFT's LoRA layers: y = W x + s · B (c ⊙ A x).

The gate c is a parameter of ``lora_A[adapter]``, whose output a forward hook multiplies by it, so every
backend that computes ``lora_B(lora_A(dropout(x))) * scaling`` works unmodified. Embeddings keep their
factors as bare parameters; they get a ``lora_c`` entry and a LoraVariant. Classes stay PEFT's.

Beside the weights, each layer holds two buffers: ``lora_ema`` (smoothed importance, Eq. 8) and
``lora_live`` (False = pruned). They are saved and loaded with the adapter, so a checkpoint is whole.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from dynlora._private import BufferDict, stand_in
from dynlora.lora.components import Factor, LoraComponents, pair_of

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_c")
_BY_ADAPTER = ("lora_ema", "lora_live", "dropped_factors", "components_of")
"""What a layer with gates holds beside the weights, each by the adapter's name."""


def _buffer(name: str, meaning: str) -> Any:
    """A property that is the module's entry in one of its layer's buffers."""

    def read(module: Any) -> Tensor:
        return getattr(module.layer, name)[module.adapter]

    def write(module: Any, value: Tensor) -> None:
        getattr(module.layer, name)[module.adapter] = value

    return property(read, write, doc=meaning)


class GatedComponents(LoraComponents):
    """The components of one gated layer: A, B and the gate c; scores and masks are its buffers."""

    is_gated = True

    @property
    def layers(self) -> tuple[Any, ...]:
        """The layer: each half of MultiheadAttention has ranks of its own."""
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
        """The gate: its product with its gradient is the sensitivity, and pruned components have 0."""
        return [self.gate_factor]

    switches = probes
    ema = _buffer("lora_ema", "Smoothed importance, (rank,).")
    live = _buffer("lora_live", "False where a component is pruned, (rank,), bool.")

    def forget_scores(self) -> None:
        """Nothing: the layer keeps its scores, also between two looks at it."""

    @property
    def is_dropped(self) -> bool:
        """Whether the module fell to rank 0 and computes no adapter any more."""
        return self.adapter in self.layer.dropped_factors

    @property
    def can_drop(self) -> bool:
        """Whether the layer can do without its adapter; PEFT asks both halves of an attention for it."""
        return not self.layer.is_half_of_attention and not self.must_stay

    @property
    def rank(self) -> int:
        """Stored components, pruned ones that still have a place included."""
        return int(self.live.shape[0])

    def resize_(self, rank: int) -> None:
        """Give the factors the rank of a checkpoint that is about to be loaded, in place; 0 drops them.

        Parameters stay the same objects, so an optimizer that holds them stays right; their values are
        undefined until the checkpoint is loaded.
        """
        if rank == 0 and self.can_drop:
            if not self.is_dropped:
                self.drop_()
        elif rank != self.rank:
            for name, entry in self.layer.dropped_factors.pop(self.adapter, {}).items():
                getattr(self.layer, name)[self.adapter] = entry
            super().resize_(rank)
            self.ema, self.live = self.ema.new_zeros(rank), self.live.new_ones(rank)

    def drop_(self) -> list[nn.Parameter]:
        """Stop computing the adapter; its empty factors are put aside for a later checkpoint."""
        emptied = self.factors
        parameters = [factor.parameter for factor in emptied]
        for factor in emptied:
            factor.cut_(torch.zeros(0, dtype=torch.int64))
        places = [getattr(self.layer, name, {}) for name in _FACTORS]
        held = [(n, p) for n, p in zip(_FACTORS, places, strict=True) if self.adapter in p]
        self.layer.dropped_factors[self.adapter] = {n: p[self.adapter] for n, p in held}
        for _, place in held:
            del place[self.adapter]
        self.ema, self.live = self.ema.new_zeros(0), self.live.new_zeros(0)
        return parameters


def attach_gate_(layer: Any, adapter: str, config: Any, *, is_half_of_attention: bool) -> None:
    """Give ``adapter`` of a stock LoRA layer its gate and buffers, and draw A and B anew, in place.

    Args:
        layer: a LoRA layer that holds ``adapter``.
        adapter: name of the adapter.
        config: its DynLoraConfig, which says how it starts.
        is_half_of_attention: whether the layer is one of the two of a MultiheadAttention.
    """
    if not hasattr(layer, "components_of"):
        _prepare_(layer, is_half_of_attention=is_half_of_attention)
    a, b = (factor.parameter for factor in pair_of(layer, adapter))
    gate = nn.Parameter(torch.zeros(a.shape[0], dtype=a.dtype, device=a.device))
    if isinstance(layer, lora.Embedding):
        layer.lora_c[adapter] = gate
        layer.lora_variant[adapter] = _EmbeddingGate()
    else:
        layer.lora_A[adapter].c = gate
        layer.lora_A[adapter].gate_hook = layer.lora_A[adapter].register_forward_hook(_times_gate)
    layer.lora_ema[adapter] = torch.zeros(a.shape[0], device=a.device)
    layer.lora_live[adapter] = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
    layer.dropped_factors.pop(adapter, None)  # of a namesake replaced just now
    layer.components_of[adapter] = GatedComponents
    with torch.no_grad():
        if config.init_lora_weights is False or (config.init_std is None and config.init == "lora"):
            gate.fill_(1.0)  # A and B stay as PEFT has drawn them
        elif config.init_std is None:
            for factor in (a, b):
                nn.init.kaiming_uniform_(factor, a=0)  # the official code's a
        else:
            for factor in (a, b):
                nn.init.normal_(factor, std=config.init_std)


def detach_gate_(layer: Any, adapter: str) -> None:
    """Take gate and buffers of ``adapter`` off; the last one leaves a layer that is all PEFT's."""
    if adapter in layer.lora_A and hasattr(layer.lora_A[adapter], "c"):
        layer.lora_A[adapter].gate_hook.remove()
        del layer.lora_A[adapter].c, layer.lora_A[adapter].gate_hook
    if isinstance(layer.lora_variant.get(adapter), _EmbeddingGate):
        del layer.lora_variant[adapter]
    for name in ("lora_c", *_BY_ADAPTER):
        if adapter in getattr(layer, name, ()):
            del getattr(layer, name)[adapter]
    if not layer.components_of:
        layer.load_hook.remove()
        layer.other_param_names = tuple(n for n in layer.other_param_names if n not in _BY_ADAPTER)
        for name in (*_BY_ADAPTER, "get_delta_weight", "load_hook", "is_half_of_attention"):
            delattr(layer, name)
        if hasattr(layer, "lora_c"):
            layer.adapter_layer_names = type(layer).adapter_layer_names
            del layer.lora_c


def _prepare_(layer: Any, *, is_half_of_attention: bool) -> None:
    """Let a stock layer hold gates."""
    layer.lora_ema, layer.lora_live = (BufferDict({}, persistent=True) for _ in range(2))
    layer.dropped_factors, layer.components_of = {}, {}
    layer.is_half_of_attention = is_half_of_attention
    # what PEFT's delete_adapter empties
    layer.other_param_names = (*layer.other_param_names, *_BY_ADAPTER)
    if isinstance(layer, lora.Embedding):
        layer.lora_c = nn.ParameterDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_c")
    layer.get_delta_weight = partial(_delta_weight, layer)
    layer.load_hook = layer.register_load_state_dict_pre_hook(_take_ranks)


def _times_gate(lora_a: Any, _args: Any, z: Tensor) -> Tensor:
    """The output of a Linear or ConvNd, one channel for each component, times c."""
    c = lora_a.c.to(z.dtype)
    return z * (c if isinstance(lora_a, nn.Linear) else c.view(1, -1, *[1] * (z.ndim - 2)))


def _delta_weight(layer: Any, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
    """What PEFT merges, with c in A, in an Embedding in B; with gradient."""
    stock = partial(type(layer).get_delta_weight, layer, adapter, *args, **kwargs)
    if adapter not in layer.components_of:
        return stock()
    c = GatedComponents("", layer, adapter).gate
    if isinstance(layer, lora.Embedding):
        b = layer.lora_embedding_B[adapter]
        with stand_in(layer.lora_embedding_B, adapter, b * c.to(b.dtype)):
            return stock()
    a = layer.lora_A[adapter].weight
    gated = a * c.to(a.dtype).view(-1, *[1] * (a.ndim - 1))
    with stand_in(layer.lora_A[adapter], "weight", gated):
        return stock()


def _take_ranks(layer: Any, state: dict[str, Tensor], prefix: str, *_rest: object) -> None:
    """Before a layer is loaded: give its gated adapters the ranks that the state holds.

    accelerate's ``save_state`` takes all empty tensors for one shared tensor and keeps one of them, so
    those of modules of rank 0 may have to be put back.
    """
    is_whole_model = any(key.startswith(f"{prefix}base_layer.") for key in state)
    for adapter in layer.components_of:
        ema, live = f"{prefix}lora_ema.{adapter}", f"{prefix}lora_live.{adapter}"
        factors = (f"{prefix}lora_A.{adapter}.weight", f"{prefix}lora_embedding_A.{adapter}")
        if is_whole_model and not any(name in state for name in factors):
            state.setdefault(ema, torch.zeros(0))
            state.setdefault(live, torch.zeros(0, dtype=torch.bool))
        if ema in state:
            GatedComponents("", layer, adapter).resize_(state[ema].shape[0])


class _EmbeddingGate(lora.LoraVariant):  # type: ignore[misc]  # peft is untyped
    """Forward and merge of a gated embedding: e(x) = W[x] + s · (A[:, x]ᵀ ⊙ c) Bᵀ."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_kwargs: Any) -> None:
        """Nothing to do: ``attach_gate_`` follows whenever PEFT builds the factors."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.add_(module.get_delta_weight(active_adapter))

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **_kwargs: Any
    ) -> Tensor:
        z = module._embed(x, module.lora_embedding_A[active_adapter].T)
        z = z * module.lora_c[active_adapter].to(z.dtype)
        update = z @ module.lora_embedding_B[active_adapter].T * module.scaling[active_adapter]
        scale = module._get_embed_scale()  # Gemma and others scale inside their embedding
        return result + (update if scale is None else update * scale.to(update.dtype))
