"""A safetensors file written one tensor at a time, for weights that should not all be in memory."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of torch's dtypes."""

DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file whose header is ``specs`` and whose content comes tensor by tensor.

    Args:
        path: the file to write.
        specs: shape and dtype by name, in the order of the file.
        tensors: name and tensor in the same order, made when asked for.
        metadata: strings of the header, such as {"format": "pt"}.

    Raises:
        ValueError: a tensor is not what its spec says.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (expected, spec), (name, tensor) in zip(specs.items(), tensors, strict=True):
            if (name, tuple(tensor.shape), tensor.dtype) != (expected, spec.shape, spec.dtype):
                raise ValueError(
                    f"tensor {name!r} of shape {tuple(tensor.shape)} and {tensor.dtype} is not the "
                    f"{expected!r} of shape {spec.shape} and {spec.dtype} that the header says."
                )
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
