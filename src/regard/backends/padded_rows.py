"""Masks and biases as the portable kernels read them fast: in rows padded to 16 elements.

Triton reads several elements at once only where it can tell that each 16 of a row exist or not together, and begin at
an aligned address: from factors of 16 in strides and sizes. Else every element is a load with an address of its own,
and around those, compiled for sm90 at head dim 128, the forward spills hundreds of bytes a thread.
"""

from __future__ import annotations

import functools

from torch import Tensor

from regard.backends.launch import is_aligned
from regard.config import AttentionInputs

_ELEMENTS = 16


def with_padded_rows(inputs: AttentionInputs) -> AttentionInputs:
    """Inputs with mask and bias in padded rows, copied where they are not."""
    mask, bias = inputs.mask, inputs.bias
    if mask is not None:
        mask = _in_padded_rows(mask)
    if bias is not None:
        bias = _in_padded_rows(bias)
    return inputs if mask is inputs.mask and bias is inputs.bias else inputs._replace(mask=mask, bias=bias)


def readable_keys(inputs: AttentionInputs, seqlen_k: int) -> int | None:
    """How many keys the rows of mask and bias may be read for, those without a meaning included; None without either.

    Follows from how `with_padded_rows` left them: strides, and addresses modulo 16.
    """
    tensors = [tensor for tensor in (inputs.mask, inputs.bias) if tensor is not None]
    if not tensors:
        return None
    return _rounded_up(seqlen_k) if all(map(_looks_padded, tensors)) else seqlen_k


def broadcast_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides with 0 along broadcast dimensions."""
    if tensor is None:
        return (0, 0, 0, 0)
    return _broadcast(tensor.shape, tensor.stride())


def _broadcast(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _in_padded_rows(tensor: Tensor) -> Tensor:
    """The same values, copied where rows without padding lie side by side; broadcast dimensions are not expanded.

    Also one row that all queries share, and the rows of a single query: elements that the kernel loads one by one cost
    it time for tiles of some 64 queries, be they there or not, the copy for those that there are. Left alone are one
    element a row, rows whose elements lie apart, and overlapping rows, whose copy would take more memory than they do.
    """
    if _looks_padded(tensor):
        if tensor.shape[-1] % _ELEMENTS == 0 or _has_room_for_padding(tensor):
            return tensor
    elif broadcast_strides(tensor)[-1] != 1:
        return tensor
    once = tensor.detach()
    if 0 in tensor.stride():
        once = once[tuple([slice(None if stride else 1) for stride in tensor.stride()])]
    if once.nbytes > once.untyped_storage().nbytes():
        return tensor
    *rows, keys = once.shape
    padded = once.new_empty((*rows, _rounded_up(keys))).narrow(-1, 0, keys).copy_(once)
    return padded if padded.shape == tensor.shape else padded.expand(tensor.shape)


def _looks_padded(tensor: Tensor) -> bool:
    """Whether Triton can tell that rows are padded; rows of one element for all keys need no padding."""
    return _strides_look_padded(tensor.shape, tensor.stride(), is_aligned(tensor))


@functools.lru_cache(maxsize=1024)
def _strides_look_padded(shape: tuple[int, ...], strides: tuple[int, ...], aligned: bool) -> bool:
    *outer, last = _broadcast(shape, strides)
    return last == 0 or (last == 1 and aligned and all(stride % _ELEMENTS == 0 for stride in outer))


def _has_room_for_padding(tensor: Tensor) -> bool:
    """Whether the last row can be read up to its padding: a view may end with the memory that it is of."""
    keys = tensor.shape[-1]
    strides = broadcast_strides(tensor)
    padding = (_rounded_up(keys) - keys) * strides[-1]
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    end = tensor.storage_offset() + last + 1 + padding
    return end * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _rounded_up(keys: int) -> int:
    return -(-keys // _ELEMENTS) * _ELEMENTS
