"""Rotate a module's components into an orthogonal basis; the function stays the same.

In the basis that training leaves, two components can share one direction, and both look needed. With an
orthogonal T, A' = T A and B' = B Tᵀ have the same product, gradients turn with them, and so do the steps
of SGD. T is chosen so that the columns of B' are orthogonal: then so are the components bᵢaᵢᵀ, and what
one of them does no other does.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynlora.lora.components import Factor, LoraComponents, find_adapter, find_components

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""State that averages squares of gradients; turned by the squares of T⁻ᵀ."""

_MOMENTS = ("exp_avg", "momentum_buffer", "exp_avg_diff")
"""State that is a sum of gradients, or near to one; turned by T⁻ᵀ."""

_WEIGHTS = ("z", "ax", "p0", "master_param", "master_weight")
"""State that is another point of the parameter's own space (schedule-free z); turned by T."""


@torch.no_grad()
def warm_start_(model: nn.Module, adapter: str | None = None) -> None:
    """Rotate a trained LoRA so that pruning takes what matters least, in place.

    "Shrink my r=64 LoRA to a mean rank of 16": load it with PEFT, ``is_trainable=True``, call this, and
    train on with ``DynLoraCallback(target_r=16)`` or RankAllocator. The function of the model does not
    change. Optimizers built before hold state for the old basis: build them afterwards.

    Args:
        model: a model with a LoRA adapter, wrapped or not.
        adapter: which one; may be left out if there is one, or one that is trainable.

    Raises:
        ValueError: there is no such adapter, or it is sharded over several processes.
    """
    adapter, _ = find_adapter(model, adapter)
    modules = find_components(model, adapter)
    if any(m.is_sharded for m in modules):
        raise ValueError(
            f"adapter={adapter!r} is sharded over several processes: call warm_start_ before FSDP or "
            "DeepSpeed wraps the model."
        )
    for module in modules:
        if not module.is_gated and not module.is_dropped:
            rotate_(module)


@torch.no_grad()
def rotate_(module: LoraComponents, optimizer: Optimizer | None = None) -> None:
    """Make the components of each of the module's pairs orthogonal, largest first, in place.

    Scores of the module mean nothing afterwards and are set to 0.

    Args:
        module: a stock LoRA, not sharded.
        optimizer: its state turns along: first moments exactly, averages of squares by the squares of T
            (exact where gradients of components do not correlate), weights as the parameter. State of any
            other kind is deleted, so that the optimizer begins it anew.
    """
    for (a, b), switch in zip(module.pairs, module.switches, strict=True):
        turns = torch.stack([basis(v) for v in switch.vectors(switch.parameter.detach())])
        for factor in (a, b):
            turn_(factor, turns, turns, optimizer)
    module.ema.zero_()


def basis(vectors: Tensor) -> Tensor:
    """An orthogonal T (rank, rank) for which the rows of T · vectors are orthogonal, largest first.

    Args:
        vectors: one row a component, (rank, length).

    >>> t = basis(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    >>> (t.float() @ torch.tensor([[1.0, 0.0], [1.0, 0.0]])).abs().round(decimals=4)
    tensor([[1.4142, 0.0000],
            [0.0000, 0.0000]])
    """
    exact = vectors.double()
    _, columns = torch.linalg.eigh(exact @ exact.T)
    return columns.T.flip(0)


def turn_(
    factor: Factor, turns: Tensor, gradient_turns: Tensor, optimizer: Optimizer | None
) -> None:
    """Turn a factor by T of each copy, (copies, rank, rank), in place.

    Args:
        factor: A or B of a pair.
        turns: T; the other factor of the pair is turned by T⁻ᵀ.
        gradient_turns: T⁻ᵀ, which gradients of this factor turn by, and what the optimizer averages of
            them; T again where T is orthogonal.
        optimizer: whose state turns along, as :func:`rotate_` says.
    """
    parameter = factor.parameter
    _apply_(factor, parameter.data, turns)
    if parameter.grad is not None:
        _apply_(factor, parameter.grad, gradient_turns)
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        is_known = key in _SQUARES + _MOMENTS + _WEIGHTS
        if not is_known or value.shape != parameter.shape or not value.is_floating_point():
            del optimizer.state[parameter]  # type: ignore[union-attr]  # there is a state
            return
        turned_by = turns if key in _WEIGHTS else gradient_turns
        _apply_(factor, value, turned_by.square() if key in _SQUARES else turned_by)


def _apply_(factor: Factor, tensor: Tensor, turns: Tensor) -> None:
    plain = tensor.contiguous()  # a copy where a convolution's weight lies channels last
    vectors = factor.vectors(plain)  # a view
    turned = turns.to(vectors.device) @ vectors.double()
    vectors.copy_(turned)
    if plain is not tensor:
        tensor.copy_(plain)
