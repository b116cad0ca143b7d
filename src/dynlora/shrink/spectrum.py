"""Singular values of updates, from their factors alone, and factors made of the triplets that stay."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynlora.adapter_files.updates import Update


@dataclass(frozen=True)
class Spectrum:
    """B A of one module as Σᵢ σᵢ uᵢ vᵢᵀ, for each expert, largest first; the scaling is left out.

    Attributes:
        update: the module.
        left: u, (experts, out, triplets).
        sigma: σ in float64, (experts, triplets).
        right: vᵀ, (experts, triplets, in · kernel).
    """

    update: Update
    left: Tensor
    sigma: Tensor
    right: Tensor

    @property
    def energy(self) -> Tensor:
        """(scaling · σ)² of each triplet, summed over experts, in float64; (triplets,), not rising."""
        return (self.update.scaling * self.sigma).square().sum(0)

    def factors(self, keep: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A and B as the file stores them: the trained ones where all stays, else those of ``rotated``.

        Args:
            keep: mask of triplets, (triplets,).
            rank: rank of the result, at least the number of kept triplets.
        """
        if rank == self.update.rank == int(keep.sum()):
            return self.update.a, self.update.b
        return self.rotated(keep, rank)

    def rotated(self, keep: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A and B as the file stores them, made of the kept triplets and zeros up to ``rank``.

        Each gets √σ, so that both keep the size that half precision holds best.
        """
        update = self.update
        experts, root = update.num_experts, self.sigma[:, keep].sqrt()
        columns = self.left.new_zeros(experts, update.b.shape[0], rank)
        rows = self.right.new_zeros(experts, rank, self.right.shape[-1])
        columns[..., : root.shape[1]] = self.left[..., keep] * root.unsqueeze(1)
        rows[:, : root.shape[1]] = self.right[:, keep] * root.unsqueeze(2)
        a_shape, b_shape = update.shapes(rank)
        a = rows.reshape(a_shape).to(update.a.dtype)
        b = columns.permute(1, 2, 0).reshape(b_shape).to(update.b.dtype)
        return a.contiguous(), b.contiguous()

    def difference(self, keep: Tensor, b: Tensor, a: Tensor) -> float:
        """Frobenius norm of B A minus the kept triplets, relative to that of the kept triplets.

        Args:
            keep: mask of triplets, (triplets,).
            b: B by expert, (experts, out, r).
            a: A by expert, (experts, r, in).
        """
        kept = self.left[..., keep].double() * self.sigma[:, keep].unsqueeze(1)
        tall = torch.cat([b.double(), -kept], dim=2)
        wide = torch.cat([a.double(), self.right[:, keep].double()], dim=1)
        squared = ((tall.mT @ tall) * (wide @ wide.mT)).sum().clamp(min=0)
        norm = self.sigma[:, keep].square().sum()
        return float((squared / norm).sqrt() if norm else squared.sqrt())


@torch.no_grad()
def decompose(update: Update) -> Spectrum:
    """QR of B and of Aᵀ, and an SVD of the small core between them, in float64.

    A triplet that a narrow layer has no room for does not exist: there are min(out, in, r) of them.
    """
    b, a = update.stacked()
    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().mT)
    u, sigma, vt = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = torch.float64 if update.a.dtype == torch.float64 else torch.float32
    return Spectrum(update, (left @ u).to(kept), sigma, (vt @ right.mT).to(kept))
