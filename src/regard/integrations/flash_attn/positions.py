"""Where the tokens of packed sequences and of paged caches lie."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ConfigError


def sequence_and_position(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each packed token: the sequence it belongs to and its position there, both int64 (total,).

    Tokens past the last offset count as the last sequence's.
    """
    token = torch.arange(total, device=cu_seqlens.device)
    offsets = cu_seqlens.long()
    sequence = torch.searchsorted(offsets[1:-1], token, right=True)
    return sequence, token - offsets[sequence]


def page_and_row(pages: Tensor, page_size: int, position: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
    """Of tokens at ``position`` (B, n) in their sequences: the page that holds each and the row inside it, int64.

    ``pages`` is (B, pages a sequence). Pages that do not exist are an error on the CPU and are clamped on a GPU, as
    positions past the last page are everywhere: callers have checked those where they can be.
    """
    position = position.clamp(0, pages.shape[1] * page_size - 1)
    if pages.shape[1] == 1:  # most caches: one page holds the whole sequence
        page, row = pages.long().expand(position.shape), position
    else:
        page = pages.long().gather(1, torch.div(position, page_size, rounding_mode="floor"))
        row = position % page_size
    check_range("block_table", page, 0, num_pages - 1)
    return page.clamp(0, num_pages - 1), row


def check_range(name: str, values: int | Tensor, least: int, most: int, what: str = "values") -> None:
    """Raise a `ConfigError` for integers outside least..most. A GPU is not synchronised for it: tensors there pass."""
    if isinstance(values, Tensor):
        if values.device.type != "cpu" or torch.compiler.is_compiling() or values.numel() == 0:
            return
        lowest, highest = (int(bound) for bound in values.aminmax())
    else:
        lowest = highest = values
    if lowest < least or highest > most:
        seen = lowest if lowest == highest else f"{what} in {lowest}..{highest}"
        raise ConfigError(name, seen, f"{what} in {least}..{most}")
