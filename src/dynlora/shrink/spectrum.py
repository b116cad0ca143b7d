"""Updates as sums of triplets, singular ones from their factors alone, and adapters of those that stay."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynlora.adapter_files.updates import Adapter, Update
from dynlora.adapter_files.write import metadata
from dynlora.lora.triplets import triplets

Cut = Sequence[Tensor]
"""For each module a mask of its triplets: which stay."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
"""safetensors' names of dtypes; others are taken to have names as long as ``F32``."""


@dataclass(frozen=True)
class Spectrum:
    """B A of one module as Σᵢ σᵢ uᵢ vᵢᵀ with unit vectors, for each expert; the scaling is left out.

    Attributes:
        update: the module.
        left: u, (experts, out, triplets).
        sigma: σ in float64, (experts, triplets): of :func:`decompose` the singular values, falling.
        right: vᵀ, (experts, triplets, in · kernel).
    """

    update: Update
    left: Tensor
    sigma: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        """Triplets: min(out, in, r), since a narrow layer has no room for more."""
        return self.sigma.shape[1]

    @property
    def energy(self) -> Tensor:
        """(scaling · σ)² of each triplet, summed over experts, in float64; (triplets,)."""
        return (self.update.scaling * self.sigma).square().sum(0)

    def cut(self, keep: Tensor, rank: int) -> Update:
        """The update of the kept triplets, filled up with zeros to ``rank``.

        Each factor gets √σ, so that both keep the size that half precision holds best.

        Args:
            keep: mask of triplets, (triplets,).
            rank: rank of the result, at least the number of kept triplets.
        """
        root = self.sigma[:, keep].sqrt()
        b, a = self.left[..., keep] * root.unsqueeze(1), self.right[:, keep] * root.unsqueeze(2)
        return self.update.of_factors(b, a).padded(rank)

    def squared_norm(self, keep: Tensor) -> float:
        """‖Σ σᵢ uᵢ vᵢᵀ‖² of the triplets ``keep``, summed over experts, the scaling left out."""
        left, right = self.left[..., keep].double(), self.right[:, keep].double()
        sigma = self.sigma[:, keep]
        grams = (left.mT @ left) * (right @ right.mT)  # identities for singular triplets
        return float((grams * sigma.unsqueeze(1) * sigma.unsqueeze(2)).sum().clamp(min=0))

    def difference(self, keep: Tensor, update: Update) -> float:
        """Frobenius norm of an update's B A minus the kept triplets, relative to √Σσ² of these."""
        b, a = update.stacked()
        kept = self.left[..., keep].double() * self.sigma[:, keep].unsqueeze(1)
        tall = torch.cat([b.double(), -kept], dim=2)
        wide = torch.cat([a.double(), self.right[:, keep].double()], dim=1)
        squared = ((tall.mT @ tall) * (wide @ wide.mT)).sum().clamp(min=0)
        norm = self.sigma[:, keep].square().sum()
        return float((squared / norm).sqrt() if norm else squared.sqrt())

    @torch.no_grad()
    def turned(self, left: Tensor, right: Tensor) -> tuple["Spectrum", Tensor]:
        """The same update by the triplets of two metrics between its factors, and their σ².

        Args:
            left: L of ``dynlora.lora.triplets``, (experts, triplets, triplets), for factors of which each
                holds √σ.
            right: R.

        Returns:
            The update by those triplets, and σ² in these metrics, (experts, triplets), falling.
        """
        for_a, for_b, squares = triplets(left, right)
        root = self.sigma.sqrt()
        rows = for_a @ (root.unsqueeze(2) * self.right.double())
        columns = (root.unsqueeze(1) * self.left.double()) @ for_b.mT
        sizes = columns.norm(dim=1), rows.norm(dim=2)
        u, v = columns / _not_0(sizes[0]).unsqueeze(1), rows / _not_0(sizes[1]).unsqueeze(2)
        kept = self.left.dtype
        return Spectrum(self.update, u.to(kept), sizes[0] * sizes[1], v.to(kept)), squares


def _not_0(lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


@torch.no_grad()
def decompose(update: Update) -> Spectrum:
    """QR of B and of Aᵀ, and an SVD of the small core between them, in float64."""
    b, a = update.stacked()
    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().mT)
    u, sigma, vt = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = torch.float64 if update.a.dtype == torch.float64 else torch.float32
    return Spectrum(update, (left @ u).to(kept), sigma, (vt @ right.mT).to(kept))


@dataclass(frozen=True)
class Spectra:
    """An adapter by triplets, singular ones or others, and the form in which cuts of it are written.

    Attributes:
        adapter: as it was read.
        modules: one for each update, in the same order.
        uniform: give every module the largest kept rank, filled up with zeros.
    """

    adapter: Adapter
    modules: Sequence[Spectrum]
    uniform: bool = False

    @property
    def everything(self) -> Cut:
        """The cut that keeps all."""
        return [torch.ones(m.count, dtype=torch.bool) for m in self.modules]

    @property
    def nothing(self) -> Cut:
        """The cut that keeps none, to measure: what was trained beside the LoRA stays."""
        return [torch.zeros(m.count, dtype=torch.bool) for m in self.modules]

    @property
    def cost(self) -> int:
        """Parameters of a LoRA of rank 1 on the same modules."""
        return sum(update.cost for update in self.adapter.updates)

    def order(self, worth: Sequence[Tensor] | None = None) -> Tensor:
        """All triplets of the model by worth per parameter, falling; those that must stay come first.

        A wide module pays for its width: of two triplets of equal worth the cheaper one comes first.

        Args:
            worth: of each module's triplets, (triplets,), not negative; their energy if not given.

        Returns:
            Places of the triplets as if all modules' triplets stood in one row, (triplets of the model,).
        """
        rows = []
        for place, module in enumerate(self.modules):
            row = (module.energy if worth is None else worth[place].double()) / module.update.cost
            if module.update.min_rank:
                row[int(row.argmax())] = torch.inf
            rows.append(row)
        return torch.cat(rows).argsort(descending=True, stable=True)

    def first(self, order: Tensor, count: int) -> Cut:
        """The cut that keeps the first ``count`` triplets of an order, and those that must stay."""
        forced = sum(m.update.min_rank for m in self.modules)
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: max(count, forced, 1)]] = True
        return mask.split([m.count for m in self.modules])

    def same_rank(self, rank: int) -> Cut:
        """The cut that keeps the ``rank`` largest singular values of every module."""
        return [torch.arange(m.count) < rank for m in self.modules]

    def ranks(self, cut: Cut) -> list[int]:
        """Rank of each update in the file; modules that one name in a config means share theirs."""
        updates = self.adapter.updates
        kept = [max(int(mask.sum()), u.min_rank) for u, mask in zip(updates, cut, strict=True)]
        if self.uniform:
            return [max(kept)] * len(kept)
        by_group: dict[str, int] = {}
        for update, rank in zip(updates, kept, strict=True):
            by_group[update.group] = max(rank, by_group.get(update.group, 0))
        return [by_group[update.group] for update in updates]

    def dead(self, cut: Cut) -> set[str]:
        """Modules of rank 0, those that the source had lost before included."""
        ranks = zip(self.adapter.updates, self.ranks(cut), strict=True)
        return {*self.adapter.pruned, *(update.group for update, rank in ranks if not rank)}

    def parameters(self, cut: Cut) -> int:
        """Parameters of the low-rank factors; heads and other tensors are not counted."""
        pairs = zip(self.adapter.updates, self.ranks(cut), strict=True)
        return sum(update.cost * rank for update, rank in pairs)

    def energy(self, cut: Cut) -> float:
        """1 − ‖ΔW − cut‖² / ‖ΔW‖² of the whole model: of singular triplets the share of Σσ² that stays."""
        whole = gone = 0.0
        for module, mask in zip(self.modules, cut, strict=True):
            scaling = module.update.scaling**2
            whole += scaling * module.squared_norm(torch.ones_like(mask))
            gone += scaling * module.squared_norm(~mask)
        return 1 - gone / whole

    def cut(self, cut: Cut) -> Adapter:
        """The adapter of the triplets that stay; a module of which all stay keeps its trained factors."""
        updates = []
        for module, mask, rank in zip(self.modules, cut, self.ranks(cut), strict=True):
            if rank == module.update.rank == int(mask.sum()):
                updates.append(module.update)
            elif rank:
                updates.append(module.cut(mask, rank))
        return dataclasses.replace(
            self.adapter, updates=tuple(updates), pruned=tuple(sorted(self.dead(cut)))
        )

    def num_bytes(self, cut: Cut) -> int:
        """Bytes of ``adapter_model.safetensors``, header included, by the format of such files.

        safetensors puts wide dtypes first, then orders by name; the order decides the offsets' digits.
        """
        specs = [(key, tuple(t.shape), t.dtype) for key, t in self.adapter.others.items()]
        for update, rank in zip(self.adapter.updates, self.ranks(cut), strict=True):
            if rank:
                factors = zip(update.keys, update.shapes(rank), (update.a, update.b), strict=True)
                specs += [(key, shape, factor.dtype) for key, shape, factor in factors]
        header: dict[str, object] = {"__metadata__": metadata(self.dead(cut))}
        end = 0
        for key, shape, dtype in sorted(specs, key=lambda spec: (-spec[2].itemsize, spec[0])):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            name = _DTYPES.get(dtype, "F32")
            header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + -(-length // 8) * 8 + end
