"""What an optimizer keeps for one parameter, cut down to the live components.

A state entry is cut along the dimension that counts components, if it has that dimension. State whose
shape says nothing about components is refused, never guessed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora.errors import CannotShrinkError

_BLOCK = 256  # bitsandbytes quantises optimizer state in blocks of so many values, in memory order
_WAY_OUT = "Set compact=False to keep all shapes until the end."


def cut_states(state: Mapping[str, Any], old: Tensor, keep: Tensor, dim: int) -> dict[str, Any]:
    """The optimizer's state of one parameter, entries by name, for its live components only.

    Args:
        state: as in ``optimizer.state[old]``; entries that do not count components stay the same objects.
        old: the parameter before the cut.
        keep: indices of the live components, (live,), on the device of ``old``.
        dim: the dimension of ``old`` that counts components.

    Raises:
        CannotShrinkError: an entry has a shape that is neither the parameter's nor a known one.
    """
    quantised = {key for key in state if f"absmax{key.removeprefix('state')}" in state}
    cut: dict[str, Any] = {}
    for key in quantised:
        cut |= _cut_quantised(state, key.removeprefix("state"), old, keep, dim)
    for key, value in state.items():
        if key not in cut:
            cut[key] = _cut(key, value, old, keep, dim)
    return {key: cut[key] for key in state}


def _cut(key: str, value: object, old: Tensor, keep: Tensor, dim: int) -> object:
    """The part of entry ``key`` that belongs to the components in ``keep``; the rest as in ``cut_states``.

    Known are: a tensor of the parameter's shape, or a stack of such (AdEMAMix); a factored second moment
    as Adafactor keeps it, in torch (one dimension is 1) or transformers (the last or the last but one
    dimension is missing); a scalar; a list, tuple or dict of such entries; a plain value.
    """
    if isinstance(value, Mapping):
        return type(value)(  # type: ignore[call-arg]  # dict and its subclasses
            (k, _cut(f"{key}.{k}", v, old, keep, dim)) for k, v in value.items()
        )
    if isinstance(value, list | tuple):
        parts = [_cut(f"{key}[{i}]", v, old, keep, dim) for i, v in enumerate(value)]
        kind: Any = type(value)
        is_named = hasattr(value, "_fields")  # a NamedTuple takes fields
        return kind(*parts) if is_named else kind(parts)
    if not isinstance(value, Tensor):
        if isinstance(value, int | float | str | bool | bytes | None) or callable(value):
            return value
        raise CannotShrinkError(
            f"optimizer state {key!r} is a {type(value).__name__}, which may hold tensors that cannot be "
            f"seen. {_WAY_OUT}"
        )
    if type(value) not in {Tensor, torch.nn.Parameter}:
        raise CannotShrinkError(
            f"optimizer state {key!r} is a {type(value).__name__}, whose parts cannot be taken out. "
            f"{_WAY_OUT}"
        )
    if value.ndim == old.ndim and all(
        have in {full, 1} for have, full in zip(value.shape, old.shape, strict=True)
    ):
        return value.index_select(dim, keep) if value.shape[dim] == old.shape[dim] else value
    if value.ndim == old.ndim + 1 and value.shape[1:] == old.shape:
        return value.index_select(dim + 1, keep)
    if value.numel() == 1:
        return value
    rows, columns = old.shape[:-1], (*old.shape[:-2], *old.shape[-1:])
    if old.ndim > 1 and value.shape == rows and not ("col" in key and rows == columns):
        return value.index_select(dim, keep) if dim < old.ndim - 1 else value
    if old.ndim > 1 and value.shape == columns:
        return value if dim == old.ndim - 2 else value.index_select(min(dim, old.ndim - 2), keep)
    raise CannotShrinkError(
        f"optimizer state {key!r} of shape {tuple(value.shape)} cannot be cut with its parameter of "
        f"shape {tuple(old.shape)}. {_WAY_OUT}"
    )


def _cut_quantised(
    state: Mapping[str, Any], suffix: str, old: Tensor, keep: Tensor, dim: int
) -> dict[str, Any]:
    """One moment of a bitsandbytes 8-bit optimizer: codes, their book, one maximum a block.

    Blocks run over all values in memory order, so that a cut moves their borders: the moment is
    decoded, cut and encoded anew. That loses up to half a code (the book has no -1, so that a block whose
    largest value is negative finds a smaller maximum); where nothing is cut, nothing is touched.
    """
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    names = [f"{part}{suffix}" for part in ("state", "qmap", "absmax")]
    codes, book, maxima = (state[name] for name in names)
    if codes.shape != old.shape or maxima.ndim != 1:
        raise CannotShrinkError(
            f"optimizer state {names[0]!r} of shape {tuple(codes.shape)} holds 8-bit codes and cannot be "
            f"cut with its parameter of shape {tuple(old.shape)}. {_WAY_OUT}"
        )
    if len(keep) == old.shape[dim]:
        return {name: state[name] for name in names}
    decoded = dequantize_blockwise(codes, absmax=maxima, code=book, blocksize=_BLOCK)
    kept = decoded.index_select(dim, keep).contiguous()
    encoded, how = quantize_blockwise(kept, code=book, blocksize=_BLOCK)
    return dict(zip(names, (encoded, book, how.absmax.to(maxima.dtype)), strict=True))
