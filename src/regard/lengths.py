"""Sequence lengths, offsets and page numbers that live in tensors: what they must be, and what they say.

A GPU's are read once per tensor and version, so that it is synchronised once and not in every layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ConfigError
from regard.tracing import is_traced


def check_index_vector(name: str, tensor: object, length: int | None, device: torch.device) -> Tensor:
    """Return the tensor if it is int32, contiguous, of shape (length,) and on the device.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(tensor, Tensor):
        raise ConfigError(name, type(tensor).__name__, "a torch.Tensor")
    if tensor.dtype != torch.int32:
        raise ConfigError(name, tensor.dtype, "int32")
    if tensor.device != device:
        raise ConfigError(name, f"device {tensor.device}", f"the device of q, {device}")
    if tensor.ndim != 1 or (length is not None and tensor.shape[0] != length):
        raise ConfigError(name, f"shape {tuple(tensor.shape)}", f"shape ({'B + 1' if length is None else length},)")
    if not tensor.is_contiguous():
        raise ConfigError(name, f"stride {tensor.stride()}", "a contiguous tensor")
    return tensor


def check_kv_lens(kv_lens: Tensor, capacity: int) -> None:
    """Check key lengths on the CPU; a GPU is not synchronised for it, its kernels clamp.

    Raises:
        ConfigError: a length is not in 0..capacity.
    """
    if kv_lens.device.type != "cpu" or not _readable(kv_lens):
        return
    least, greatest = _read("kv_lens", kv_lens, _extremes)
    if least < 0 or greatest > capacity:
        index, value = next((i, n) for i, n in enumerate(kv_lens.tolist()) if not 0 <= n <= capacity)
        raise ConfigError(f"kv_lens[{index}]", value, f"0 <= length <= {capacity}, the number of keys held")


def longest_sequence(name: str, cu_seqlens: Tensor, total: int) -> int | None:
    """Check the offsets of packed sequences and return the longest one's length; None where they cannot be read.

    Raises:
        ConfigError: they do not start at 0, fall, or do not end at ``total``, the number of packed rows.
    """
    if not _readable(cu_seqlens):
        return None
    longest, last = _read(name, cu_seqlens, _longest_and_last)
    if last != total:
        raise ConfigError(name, f"last offset {last}", f"{total}, the number of packed rows")
    return longest


def describe_packed(
    totals: tuple[int, int],
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    stated: tuple[int | None, int | None],
    device: torch.device,
) -> tuple[int, int, int]:
    """Validate the offsets of packed queries and keys.

    Args:
        totals: packed rows of q and of k.
        cu_seqlens: their offsets, int32 (B + 1,).
        stated: the longest sequences according to the caller.
        device: of q.

    Returns:
        B and the longest query and key sequence: the actual ones, or the stated ones where offsets cannot be read.

    Raises:
        ConfigError: naming the argument.
    """
    longest = []
    batch = None
    for side, total, offsets, claim in zip("qk", totals, cu_seqlens, stated, strict=True):
        name = f"cu_seqlens_{side}"
        if offsets is None:
            raise ConfigError(name, None, "an int32 tensor (B + 1,), since the other cu_seqlens is given")
        check_index_vector(name, offsets, batch, device)
        if offsets.shape[0] < 1:
            raise ConfigError(name, f"shape {tuple(offsets.shape)}", "at least the leading 0")
        batch = offsets.shape[0]
        actual = longest_sequence(name, offsets, total)
        if claim is None and actual is None:
            raise ConfigError(f"max_seqlen_{side}", None, "an int while tracing or capturing a CUDA graph")
        if claim is not None and (isinstance(claim, bool) or not isinstance(claim, (int, torch.SymInt))):
            raise ConfigError(f"max_seqlen_{side}", repr(claim), "an int")
        if claim is not None and actual is not None and claim < actual:
            raise ConfigError(f"max_seqlen_{side}", claim, f"at least {actual}, the longest sequence of {name}")
        longest.append(claim if actual is None else actual)
    return batch - 1, longest[0], longest[1]  # type: ignore[operator, return-value]  # both sides were visited


def of_packed(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> list[tuple[int, int]] | None:
    """Queries and keys of each packed sequence; None where there are no offsets or they cannot be read."""
    if cu_seqlens_q is None or cu_seqlens_k is None or not _readable(cu_seqlens_q, cu_seqlens_k):
        return None
    return list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))


def check_block_table(block_table: object, batch: int, device: torch.device) -> Tensor:
    """Return the tensor if it is int32, of shape (batch, pages a sequence) and on the device.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(block_table, Tensor):
        raise ConfigError("block_table", type(block_table).__name__, "a torch.Tensor")
    if block_table.dtype != torch.int32:
        raise ConfigError("block_table", block_table.dtype, "int32")
    if block_table.ndim != 2 or block_table.shape[0] != batch:
        raise ConfigError("block_table", f"shape {tuple(block_table.shape)}", f"shape ({batch}, pages a sequence)")
    if block_table.device != device:
        raise ConfigError("block_table", f"device {block_table.device}", f"the device of q, {device}")
    return block_table


def describe_paged(k_cache: Tensor, block_table: object, kv_lens: Tensor | None, batch: int, page_size: int) -> int:
    """Validate the page table of a paged KV cache and return the key capacity of a sequence.

    Raises:
        ConfigError: naming the argument.
    """
    block_table = check_block_table(block_table, batch, k_cache.device)
    if block_table.stride(1) != 1 and block_table.shape[1] > 1:
        raise ConfigError("block_table", f"stride {block_table.stride()}", "rows of contiguous entries")
    if page_size < 1 or (k_cache.shape[0] == 0 and block_table.numel() > 0):
        raise ConfigError("k", f"shape {tuple(k_cache.shape)}", "at least one page of at least one key")
    if kv_lens is None:
        raise ConfigError("kv_lens", None, "an int32 tensor (B,): a paged cache has no other length")
    check_index_vector("kv_lens", kv_lens, batch, k_cache.device)
    check_pages(block_table, kv_lens, k_cache.shape[0], page_size)
    return block_table.shape[1] * page_size


def check_pages(block_table: Tensor, kv_lens: Tensor, pages: int, page_size: int) -> None:
    """Check on the CPU that the table's entries in use are pages of the cache; a GPU's kernels clamp them.

    Raises:
        ConfigError: naming the first row that has another entry.
    """
    if block_table.device.type != "cpu" or not _readable(block_table, kv_lens):
        return
    used = torch.arange(block_table.shape[1], device=kv_lens.device) * page_size < kv_lens[:, None]
    wrong = used & ((block_table < 0) | (block_table >= pages))
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0])
        raise ConfigError(
            f"block_table[{row}]", block_table[row, used[row]].tolist(), f"page numbers in 0..{pages - 1}"
        )


_Found = tuple[int, int]
_Find = Callable[[str, list[int]], _Found]


class _Read(NamedTuple):
    """What was found in a version of a tensor."""

    tensor: weakref.ref[Tensor]
    version: int
    found: _Found


_reads: dict[tuple[int, _Find], _Read] = {}


def _read(name: str, tensor: Tensor, find: _Find) -> _Found:
    """Apply ``find`` to a tensor's values, or remember what it found in this version of a GPU's tensor."""
    if tensor.is_inference() or tensor.device.type == "cpu":  # has no version; NumPy may have written to it
        return find(name, tensor.tolist())
    key = (id(tensor), find)
    known = _reads.get(key)
    if known is not None and known.tensor() is tensor and known.version == tensor._version:
        return known.found
    found = find(name, tensor.tolist())
    _reads[key] = _Read(weakref.ref(tensor, lambda _: _reads.pop(key, None)), tensor._version, found)
    return found


def _readable(*tensors: Tensor) -> bool:
    """Whether there are values to look at: not while tracing, and not while a CUDA graph is being captured.

    A captured graph may run again on other values, so nothing may be derived from those of the moment.
    """
    if is_traced(tensors):
        return False
    kind = tensors[0].device.type
    return kind != "meta" and not (kind == "cuda" and torch.cuda.is_current_stream_capturing())


def _extremes(_name: str, lengths: list[int]) -> _Found:
    return (min(lengths), max(lengths)) if lengths else (0, 0)


def _longest_and_last(name: str, offsets: list[int]) -> _Found:
    if offsets[0] != 0:
        raise ConfigError(name, f"first offset {offsets[0]}", "0")
    longest = 0
    for index in range(1, len(offsets)):
        length = offsets[index] - offsets[index - 1]
        if length < 0:
            raise ConfigError(
                name, f"{offsets[index]} after {offsets[index - 1]} at index {index}", "offsets that never fall"
            )
        longest = max(longest, length)
    return longest, offsets[-1]
