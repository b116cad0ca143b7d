"""Rotate a module's components into its singular triplets; the function stays the same.

In the basis that training leaves, two components can share one direction, and both look needed. In the
singular basis of BA each stands for a direction of its own.
"""

import torch
from torch import Tensor, nn

from dynlora.lora.components import LoraComponents, find_adapter, find_components


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
        if module.gate is None and not module.is_dropped:
            rotate_(module)


def rotate_(module: LoraComponents) -> None:
    """Replace the factors of each of the module's pairs by their singular triplets, in place."""
    for a, b in module.pairs:
        vectors_a = a.vectors(a.parameter.detach())
        vectors_b = b.vectors(b.parameter.detach())
        turned = [principal_components(x, y.T) for x, y in zip(vectors_a, vectors_b, strict=True)]
        vectors_a.copy_(torch.stack([x for x, _ in turned]))  # views of the parameters
        vectors_b.copy_(torch.stack([y.T for _, y in turned]))


def principal_components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product B A whose components are its singular triplets, largest first.

    B A = U S Vᵀ from the QR decompositions of B and Aᵀ and an SVD of their r x r core, in float64;
    B' = U √S, A' = √S Vᵀ. Components beyond the rank of the product are 0.

    Args:
        a: (rank, in, ...).
        b: (out, rank, ...).

    Returns:
        A' and B', the shapes and dtypes of ``a`` and ``b``.

    >>> a, b = principal_components(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0])))
    >>> (b @ a).round(decimals=3)
    tensor([[1., 0.],
            [0., 4.]])
    >>> (a.norm(dim=1) * b.norm(dim=0)).round(decimals=3)
    tensor([4., 1.])
    """
    rank = a.shape[0]
    q_b, r_b = torch.linalg.qr(b.flatten(1).double())
    q_a, r_a = torch.linalg.qr(a.flatten(1).double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    new_a = (vh * s.sqrt().unsqueeze(1)) @ q_a.T
    new_b = q_b @ (u * s.sqrt())
    gap = rank - s.numel()
    new_a = torch.cat([new_a, new_a.new_zeros(gap, new_a.shape[1])])
    new_b = torch.cat([new_b, new_b.new_zeros(new_b.shape[0], gap)], dim=1)
    return new_a.reshape(a.shape).to(a.dtype), new_b.reshape(b.shape).to(b.dtype)
