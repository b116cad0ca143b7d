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


def cut_states(state: Mapping[str, Any], old: Tensor, keep: Tensor, dim: int) -> dict[str, Any]:
    """The optimizer's state of one parameter, for its live components only.

    Args:
        state: entries by name, as in ``optimizer.state[old]``.
        old: the parameter before the cut.
        keep: indices of the live components, (live,), on the device of ``old``.
        dim: the dimension of ``old`` that counts components.

    Returns:
        New entries; those that do not count components are the same objects.

    Raises:
        CannotShrinkError: an entry has a shape that is neither the parameter's nor a known one.
    """
    quantised = {key for key in state if f"absmax{key.removeprefix('state')}" in state}
    cut: dict[str, Any] = {}
    for key in quantised:
        cut |= _cut_quantised(state, key.removeprefix("state"), old, keep, dim)
    for key, value in state.items():
        if key not in cut:
            cut[key] = cut_state(key, value, old, keep, dim)
    return {key: cut[key] for key in state}


def cut_state(key: str, value: object, old: Tensor, keep: Tensor, dim: int) -> object:
    """The part of one optimizer state entry that belongs to the components in ``keep``.

    Args:
        key: name of the entry.
        value: the entry: a tensor of the parameter's shape, or a stack of such tensors (AdEMAMix); a
            factored second moment as Adafactor keeps it, in torch (one dimension is 1) or
            transformers (the last or the last but one dimension is missing); a scalar; a list, tuple
            or dict of such entries; or a plain value.
        old: the parameter before the cut.
        keep: indices of the live components, (live,).
        dim: the dimension of ``old`` that counts components.

    Raises:
        CannotShrinkError: the entry has another shape, or is a tensor subclass of a library's own.
    """
    if isinstance(value, Mapping):
        return type(value)(  # type: ignore[call-arg]  # dict and its subclasses
            (k, cut_state(f"{key}.{k}", v, old, keep, dim)) for k, v in value.items()
        )
    if isinstance(value, list | tuple):
        parts = [cut_state(f"{key}[{i}]", v, old, keep, dim) for i, v in enumerate(value)]
        kind: Any = type(value)
        return (
            kind(*parts) if hasattr(value, "_fields") else kind(parts)
        )  # a NamedTuple takes fields
    if not isinstance(value, Tensor):
        if isinstance(value, int | float | str | bool | bytes | None) or callable(value):
            return value
        raise CannotShrinkError(
            f"optimizer state {key!r} is a {type(value).__name__}, which may hold tensors that cannot be "
            "seen. Set compact=False to keep all shapes until the end."
        )
    if type(value) not in {Tensor, torch.nn.Parameter}:
        raise CannotShrinkError(
            f"optimizer state {key!r} is a {type(value).__name__}, whose parts cannot be taken out. Set "
            "compact=False to keep all shapes until the end."
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
        f"shape {tuple(old.shape)}. Set compact=False to keep all shapes until the end."
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

    codes, book = state[f"state{suffix}"], state[f"qmap{suffix}"]
    maxima = state[f"absmax{suffix}"]
    if codes.shape != old.shape or maxima.ndim != 1:
        raise CannotShrinkError(
            f"optimizer state 'state{suffix}' of shape {tuple(codes.shape)} holds 8-bit codes and cannot "
            f"be cut with its parameter of shape {tuple(old.shape)}. Set compact=False to keep all "
            "shapes until the end."
        )
    if len(keep) == old.shape[dim]:
        return {
            name: state[name] for name in (f"state{suffix}", f"qmap{suffix}", f"absmax{suffix}")
        }
    decoded = dequantize_blockwise(codes, absmax=maxima, code=book, blocksize=_BLOCK)
    kept = decoded.index_select(dim, keep).contiguous()
    encoded, how = quantize_blockwise(kept, code=book, blocksize=_BLOCK)
    return {
        f"state{suffix}": encoded,
        f"qmap{suffix}": book,
        f"absmax{suffix}": how.absmax.to(maxima.dtype),
    }
