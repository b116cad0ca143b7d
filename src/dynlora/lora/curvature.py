"""Components in the basis in which the loss, to second order, depends on each of them by itself.

Between the factors of ΔW = s·B A stands the identity, ΔW = s·B M A with M = I, and its gradient is known
from that of B: C = ∂L/∂M = Bᵀ ∂L/∂B. From batches, L = Σ C Cᵀ and R = Σ Cᵀ C give L ⊗ R / tr L for the
Fisher information of M (Shampoo's matrices; Morwani et al. 2024, arXiv 2406.17748, on why without roots).
So another M in place of I changes the loss by about ½ ‖L^½ (I − M) R^½‖² / tr L. By this measure the
nearest M of rank k keeps the k largest terms of the singular value decomposition of L^½ R^½ (Eckart and
Young): the components of the new basis, worth σ² / tr L each, in one unit for the whole model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlora.lora.components import Factor, LoraComponents
from dynlora.lora.triplets import turn_pair_


class Curvature:
    """L and R of the adapted modules, summed over batches.

    Args:
        modules: stock LoRA, not sharded. Gradients are read from B, or from A where it alone is trained.
    """

    def __init__(self, modules: Sequence[LoraComponents]) -> None:
        self.modules = modules
        self.batches = 0
        self._sums: list[list[Tensor]] = [
            [torch.zeros(2, p.copies, m.rank, m.rank, dtype=torch.float64, device=m.ema.device)
             for p in m.probes]
            for m in modules
        ]  # fmt: skip

    @property
    def sums(self) -> list[Tensor]:
        """L and R of each pair of each module, (2, copies, rank, rank); to be added up over processes."""
        return [pair for module in self._sums for pair in module]

    @torch.no_grad()
    def add(self) -> None:
        """Take in the gradients that the parameters hold now, of one batch; a factor without any adds 0.

        A batch whose gradients are not all finite, as those of a scaled loss in fp16 may be, is left out.
        """
        middles = [[middle_gradient(probe) for probe in module.probes] for module in self.modules]
        known = [c for module in middles for c in module if c is not None]
        if not known or not all(bool(c.isfinite().all()) for c in known):
            return
        self.batches += 1
        for sums, cs in zip(self._sums, middles, strict=True):
            for pair, c in zip(sums, cs, strict=True):
                if c is not None:
                    pair += metrics_of(c)

    @torch.no_grad()
    def turn_(
        self,
        optimizer: Optimizer | None = None,
        copies: Sequence[Mapping[str, LoraComponents]] = (),
    ) -> Tensor:
        """Put the components of all modules into the new basis, in place; the function stays the same.

        Args:
            optimizer: its state turns along, as ``dynlora.lora.rotation.rotate_`` says.
            copies: modules by name of copies of the model, which turn along.

        Returns:
            Worth of each component of the model as a share of the largest, (components,), on the CPU; in
            each module it falls.
        """
        scores = []
        for module, sums in zip(self.modules, self._sums, strict=True):
            worth = torch.zeros(module.rank, dtype=torch.float64)
            for i, (pair, (left, right)) in enumerate(zip(module.pairs, sums, strict=True)):
                along = [copy[module.name].pairs[i] for copy in copies]
                squares = turn_pair_(pair, left, right, optimizer, along)
                worth += worth_of(squares, left).cpu()
            module.ema.zero_()
            scores.append(worth)
        joined = torch.cat(scores)
        largest = joined.max()
        return (joined / largest if largest > 0 else joined).float()


def middle_gradient(probe: Factor) -> Tensor | None:
    """C = ∂L/∂M of one pair, (copies, rank, rank) in float64, from the gradient of B, or of A: ∂L/∂A Aᵀ.

    None where the parameter holds no gradient.
    """
    if probe.parameter.grad is None:
        return None
    vectors = probe.vectors(probe.parameter.detach()).double()
    gradients = probe.vectors(probe.parameter.grad).double()
    is_a = probe.container in ("lora_A", "lora_embedding_A")
    return gradients @ vectors.mT if is_a else vectors @ gradients.mT


def metrics_of(c: Tensor) -> Tensor:
    """C Cᵀ and Cᵀ C of one batch, (2, copies, rank, rank), from C, (copies, rank, rank)."""
    return torch.stack([c @ c.mT, c.mT @ c])


def worth_of(squares: Tensor, left: Tensor) -> Tensor:
    """σ² / tr L of each component, (rank,), summed over copies; 0 without gradients.

    Args:
        squares: σ² of ``dynlora.lora.triplets``, (copies, rank).
        left: L, (copies, rank, rank).
    """
    trace = left.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    return (squares / torch.where(trace > 0, trace, 1.0)).sum(0)
