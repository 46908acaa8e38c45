"""What the Tensor Memory Accelerator (TMA) of NVIDIA GPUs can follow, and the descriptors it is given.

Sources: CUDA Driver API, cuTensorMapEncodeTiled; CUDA C++ Programming Guide, "Tensor Memory Access".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from regard.backends.launch import is_aligned
from regard.backends.triton_launcher import with_tensor

_BYTES = 16  # granularity of strides, and of addresses


def is_readable(tensor: Tensor) -> bool:
    """Whether TMA can follow a tensor as it lies."""
    return is_aligned(tensor) and strides_suit(tensor.stride(), tensor.element_size())


@functools.lru_cache(maxsize=1024)
def are_readable(looks: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]) -> bool:
    """Whether TMA can follow all the tensors that look like this: see `regard.backends.launch.appearance`."""
    return all(aligned and strides_suit(strides, dtype.itemsize) for strides, dtype, aligned in looks)


@functools.lru_cache(maxsize=1024)
def strides_suit(strides: tuple[int, ...], size: int) -> bool:
    """Whether TMA can follow such strides of elements of so many bytes."""
    *outer, last = strides
    return last == 1 and all(stride > 0 and stride * size % _BYTES == 0 for stride in outer)


def by_head(tensor: Tensor) -> Tensor:
    """A tensor of (B, S, H, D), or packed (S, H, D), as (B, H, S, D)."""
    return (tensor if tensor.ndim == 4 else tensor.unsqueeze(0)).transpose(1, 2)


def descriptor(tensor: Tensor, view: Tensor, block: tuple[int, ...], layout: Any = None) -> Any:
    """TMA descriptor of a tensor in the shape of a view of it: for Triton's kernels, or with a layout for Gluon's.

    Args:
        tensor: starts where its view does.
        view: rank 1 to 5, no dimension of it empty.
        block: shape of what a kernel reads at once, in as many dimensions.
        layout: Gluon's, of a block in shared memory.
    """
    return with_tensor(_template(tuple(view.shape), view.stride(), block, tensor.dtype, layout), tensor)


@functools.lru_cache(maxsize=1024)
def _template(
    shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype, layout: Any
) -> Any:
    """A descriptor without its tensor: what takes time to make and check depends on shapes alone."""
    nowhere = torch.empty(0, dtype=dtype, device="meta")
    if layout is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(nowhere, list(shape), list(strides), list(block))
    from triton.experimental.gluon.nvidia import hopper

    return hopper.TensorDescriptor(nowhere, list(shape), list(strides), list(block), layout)
