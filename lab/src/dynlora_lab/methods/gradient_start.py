"""The start ``gradient``: A as the leading right singular vectors of the loss's gradient, and B = 0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dynlora.lora.components import Factor, find_components
from dynlora_lab.methods.adapted import Target
from dynlora_lab.methods.before_training import first_batches, gradient_of, temporary_lora

OVERSAMPLING = 8
"""Directions beyond the rank in which the gradient is seen (Halko et al., SIAM Review 2011: 5 or 10)."""


def right_singular_vectors(
    target: Target, fields: Mapping[str, Any], *, rank: int
) -> dict[str, list[Tensor]]:
    """The leading right singular vectors of G = ∂L/∂W, summed over the first batches, largest first.

    A randomised range finder in two passes through a LoRA (B, A), W + B A, which the gradients
    ∂L/∂B = G Aᵀ and ∂L/∂A = Bᵀ G come from. First A = Ω, random and orthonormal, B = 0, and Q spans the
    columns of G Ωᵀ; then A = 0, B = Q, and Qᵀ G has the singular vectors that are asked for. They are
    exact where G has no more than rank + ``OVERSAMPLING`` singular values. G itself is never made, so
    quantised weights will do. The function is that of the base in both passes.

    Args:
        target: the model, in whatever mode it is (in training mode with dropout the passes differ), and
            its batches.
        fields: of the LoraConfig that says which modules are adapted.
        rank: how many vectors are needed.

    Returns:
        By module name, for each pair of factors, (copies, at most rank + ``OVERSAMPLING``, in).
    """
    batches = list(first_batches(target))
    with temporary_lora(target.model, fields, rank=rank + OVERSAMPLING) as modules:
        pairs = [pair for module in modules for pair in module.pairs]

        def accumulate() -> None:
            target.model.zero_grad()
            for batch in batches:
                target.model(**batch).loss.backward()

        for a, b in pairs:
            put_(a, orthonormal(torch.randn_like(a.vectors(a.parameter.detach()))))
            b.parameter.data.zero_()
        accumulate()
        for a, b in pairs:
            put_(b, orthonormal(b.vectors(gradient_of(b))))
            a.parameter.data.zero_()
        accumulate()
        return {
            module.name: [_right(a.vectors(gradient_of(a))) for a, _ in module.pairs]
            for module in modules
        }


def start_along_(model: torch.nn.Module, directions: Mapping[str, list[Tensor]]) -> None:
    """Give each A the first of its module's directions as rows, and each B zeros, in place.

    Rows beyond the directions that a module has, because it is narrower than its rank, stay as drawn.
    """
    for module in find_components(model, "default"):
        for (a, b), rows in zip(module.pairs, directions[module.name], strict=True):
            put_(a, rows[:, : module.rank])
            b.parameter.data.zero_()


@torch.no_grad()
def put_(factor: Factor, vectors: Tensor) -> None:
    """Write the first of a factor's vectors, (copies, at most rank, length), in place."""
    factor.vectors(factor.parameter.data)[:, : vectors.shape[1]] = vectors.to(
        factor.parameter.dtype
    )


def orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of what the rows span, (copies, rank, length), padded with rows of zeros."""
    basis = torch.linalg.qr(rows.detach().double().mT).Q.mT
    return pad(basis, (0, 0, 0, rows.shape[1] - basis.shape[1]))


def _right(gradient: Tensor) -> Tensor:
    return torch.linalg.svd(gradient.double(), full_matrices=False).Vh
