"""What a cut adapter looks like in its file: ranks, tensors and the exact number of bytes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynlora.adapter_files.plain_config import plain_fields
from dynlora.adapter_files.updates import Adapter
from dynlora.shrink.spectrum import Spectrum

Cut = Sequence[Tensor]
"""For each module a mask of its singular triplets: which stay."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
"""safetensors' names of dtypes; others are taken to have names as long."""


@dataclass(frozen=True)
class Layout:
    """An adapter with its spectra, and the form in which cuts of it are written.

    Attributes:
        adapter: as it was read.
        spectra: one for each of its updates, in the same order.
        uniform: give every module the largest kept rank, filled up with zeros.
    """

    adapter: Adapter
    spectra: Sequence[Spectrum]
    uniform: bool = False

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

    def parameters(self, cut: Cut) -> int:
        """Parameters of the low-rank factors; heads and other tensors are not counted."""
        pairs = zip(self.adapter.updates, self.ranks(cut), strict=True)
        return sum(update.cost * rank for update, rank in pairs)

    def num_bytes(self, cut: Cut) -> int:
        """Bytes of ``adapter_model.safetensors``, header included."""
        specs = {key: (tuple(t.shape), t.dtype) for key, t in self.adapter.others.items()}
        for update, rank in zip(self.adapter.updates, self.ranks(cut), strict=True):
            if rank:
                a_shape, b_shape = update.shapes(rank)
                specs[update.a_key] = (a_shape, update.a.dtype)
                specs[update.b_key] = (b_shape, update.b.dtype)
        return file_bytes(specs)

    def tensors(self, cut: Cut) -> dict[str, Tensor]:
        """Tensors by their key in the file; modules of rank 0 are absent."""
        tensors = {key: tensor.contiguous() for key, tensor in self.adapter.others.items()}
        for spectrum, mask, rank in zip(self.spectra, cut, self.ranks(cut), strict=True):
            if rank:
                update = spectrum.update
                tensors[update.a_key], tensors[update.b_key] = spectrum.factors(mask, rank)
        return tensors

    def config_fields(self, cut: Cut) -> dict[str, Any]:
        """``adapter_config.json``: the ranks of the cut, modules of rank 0 excluded, the same scalings."""
        updates = self.adapter.updates
        by_group = {u.group: rank for u, rank in zip(updates, self.ranks(cut), strict=True)}
        return plain_fields(
            self.adapter.stored,
            {group: rank for group, rank in by_group.items() if rank},
            {u.group: u.scaling for u in updates},
            dead=[group for group, rank in by_group.items() if not rank],
            parameters={u.group: u.parameters for u in updates if u.parameters},
        )

    def energy(self, cut: Cut) -> float:
        """Share of Σσ² (scaling included) that the cut keeps."""
        total = sum(float(s.energy.sum()) for s in self.spectra)
        kept = sum(float(s.energy[mask].sum()) for s, mask in zip(self.spectra, cut, strict=True))
        return kept / total


def file_bytes(specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Size of a safetensors file with these shapes and dtypes, by its format.

    safetensors puts wide dtypes first, then orders by name; the order decides the offsets' digits.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in sorted(specs, key=lambda k: (-specs[k][1].itemsize, k)):
        shape, dtype = specs[key]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        name = _NAMES.get(dtype, "F32")
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end
