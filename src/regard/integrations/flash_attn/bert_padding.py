"""flash-attn's helpers between padded batches (B, S, ...) and packed tokens (total, ...). All are differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import ConfigError

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002  # flash-attn's name
    """The rows ``indices`` (n,) of ``input`` (rows, ...), as (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) whose rows ``indices`` (n,) are ``values`` (n, ...)."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that the masks select.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or int, 1 = a token that counts.
        unused_mask: (B, S), 1 = a token that takes its place among the packed ones and does not count.

    Returns:
        the packed tokens (total, ...); their indices (total,) into the B * S flattened ones; ``cu_seqlens`` int32
        (B + 1,); the longest sequence; ``seqused`` int32 (B,), the tokens of each sequence that count.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, longest = _offsets(kept.sum(dim=-1, dtype=torch.int32))
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, longest, attention_mask.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that hold several short sequences back to back, each sequence on its own.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: int (B, S): the nonzero entries of a row are the lengths of the sequences in it, in
            order; what is left of the row is padding. ``[2, 3, 0, 0, 0, 0]``: two sequences and one token of padding.

    Returns:
        the packed tokens (total, ...); their indices (total,) into the B * S flattened ones; ``cu_seqlens`` int32
        (sequences + 1,); the longest sequence.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    filled = attention_mask_in_length.sum(dim=-1, keepdim=True)
    column = torch.arange(attention_mask_in_length.shape[-1], device=filled.device)
    indices = (column < filled).flatten().nonzero().flatten()
    cu_seqlens, longest = _offsets(lengths)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed tokens (total, ...) back to their ``indices``, as (batch, seqlen, ...) with zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).view(batch, seqlen, *hidden_states.shape[1:])


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    batch, seqlen = hidden_states.shape[:2]
    if mask.shape != (batch, seqlen):
        raise ConfigError(name, f"shape {tuple(mask.shape)}", f"shape {(batch, seqlen)} as hidden_states")


def _offsets(lengths: Tensor) -> tuple[Tensor, int]:
    """``cu_seqlens`` of sequences of these lengths, and the longest."""
    longest = int(lengths.max()) if lengths.numel() else 0
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), longest
