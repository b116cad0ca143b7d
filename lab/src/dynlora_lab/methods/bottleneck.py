"""``houlsby`` and ``pfeiffer``: bottleneck adapters behind a transformer's sub-layers."""

import re

import torch
from torch import Tensor, nn

from dynlora_lab.methods.adapted import Adapted, Target, is_in_head, train_only, trainable_beside
from dynlora_lab.methods.config_fields import component_sizes
from dynlora_lab.methods.options import AdapterOptions
from dynlora_lab.methods.trained_weights import save_trained

FEED_FORWARD = re.compile(
    r"(?<!attention)\.output\.dense$|\.(fc2|down_proj|lin2|wo|dense_4h_to_h)$|\bmlp\.c_proj$"
)
ATTENTION = re.compile(
    r"attention\.output\.dense$|\.(out_proj|o_proj|out_lin)$|attn\.(c_proj|o)$|Attention\.o$"
)


class Bottleneck(nn.Module):
    """x + W_up · gelu(W_down · x): a residual adapter behind one linear layer.

    W_up starts at 0, so the model's function is unchanged at step 0.

    Args:
        base: the frozen linear layer, (..., in) -> (..., out).
        width: of the bottleneck.
    """

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        outputs = base.weight.shape[0] if isinstance(base, nn.Linear) else base.nf
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.down = nn.Linear(outputs, width, **place)  # type: ignore[arg-type]
        self.up = nn.Linear(width, outputs, **place)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)
        change = self.up(nn.functional.gelu(self.down(y.to(self.down.weight.dtype))))
        return y + change.to(y.dtype)


def houlsby(options: AdapterOptions, target: Target) -> Adapted:
    """Adapters behind attention and behind the feed-forward net (Houlsby et al., ICML 2019)."""
    return _adapted(options, target, places=(ATTENTION, FEED_FORWARD))


def pfeiffer(options: AdapterOptions, target: Target) -> Adapted:
    """Adapters behind the feed-forward net alone (after Pfeiffer et al., EACL 2021).

    They stand on the output of the sub-layer, before the residual sum, as Houlsby's do.
    """
    return _adapted(options, target, places=(FEED_FORWARD,))


def width_within(budget: int, outputs: list[int]) -> int:
    """Largest bottleneck whose adapters have at most ``budget`` parameters, at least 1.

    An adapter behind ``out`` outputs has width · (2 · out + 1) + out parameters.

    >>> width_within(2 * (4 * 17 + 8), [8, 8])
    4
    """
    return max(1, (budget - sum(outputs)) // sum(2 * out + 1 for out in outputs))


def _adapted(
    options: AdapterOptions, target: Target, *, places: tuple[re.Pattern[str], ...]
) -> Adapted:
    model, head = target.model, target.head
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "weight")
        and any(place.search(f".{name}") for place in places)
        and (isinstance(module, nn.Linear) or hasattr(module, "nf"))
        and not is_in_head(f"{name}.weight", head)
    ]
    if not chosen:
        raise ValueError(
            f"method: no sub-layer of {type(model).__name__} was found to put a bottleneck adapter "
            "behind; choose another method."
        )
    outputs = [m.weight.shape[0] if isinstance(m, nn.Linear) else m.nf for _, m in chosen]
    width = options.bottleneck or width_within(_budget(options, target), outputs)
    for name, module in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Bottleneck(module, width))
    train_only(
        model,
        lambda name: (
            any(name.startswith((f"{place}.down.", f"{place}.up.")) for place, _ in chosen)
            or is_in_head(name, head)
        ),
    )
    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, head),
        save=lambda folder: save_trained(model, folder),
    )


def _budget(options: AdapterOptions, target: Target) -> int:
    """Parameters of a LoRA of rank ``target_r`` on the same model."""
    return int(options.target_r * sum(component_sizes(options, target).values()))
